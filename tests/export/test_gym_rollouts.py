"""NeMo Gym's own reader takes the exported files for its own, and computes the run's mean reward."""

from __future__ import annotations

import json
import subprocess
from argparse import Namespace
from pathlib import Path
from statistics import fmean

import pytest
from exported_run import TASKS, write_run

from gymexp.errors import GymexpError
from gymexp.export.gym_rollouts import write_gym_rollouts
from gymexp.files import read_lines

READER = """
import json, sys
from nemo_gym.reward_profile import RewardProfiler
rows, results = ([json.loads(line) for line in open(path)] for path in sys.argv[1:])
profiler = RewardProfiler()
tasks, agents, *_ = profiler.profile_from_data(rows, results, allow_partial_rollouts=True)
[agent] = profiler.prepare_for_serialization(agents)
summary = profiler.profile_completion_summary(rows, results)
print(json.dumps([agent["agent_ref"]["name"], agent["mean/reward"], len(tasks), summary]))
"""


def export(run: Path, to: Path, **more: object) -> tuple[Path, Path]:
    write_gym_rollouts(
        run, Namespace(gym=to, **{"eval": None, "steps": None, "env": None, "limit": None} | more)
    )
    return to.with_name(f"{to.stem}_materialized_inputs.jsonl"), to


@pytest.mark.gym
def test_nemo_gyms_profiler_has_the_mean_of_the_scored_rollouts(tmp_path, gym_python):
    files = export(write_run(tmp_path / "run"), tmp_path / "rollouts.jsonl")
    done = subprocess.run(
        [gym_python, "-c", READER, *files], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    agent, reward, num_tasks, summary = json.loads(done.stdout.splitlines()[-1])
    assert agent == "office_agent" and num_tasks == TASKS - 1
    assert reward == pytest.approx(fmean([1.0] * 6 + [0.5] * 5))
    assert (summary["expected_rollout_rows"], summary["completed_rollout_rows"]) == (TASKS, TASKS - 1)


def test_rollouts_of_a_task_are_counted_and_have_its_row_the_verdict_and_the_output(tmp_path):
    inputs, results = map(read_lines, export(write_run(tmp_path / "run"), tmp_path / "x.jsonl", steps="3:4"))
    places = [(row["_ng_task_index"], row["_ng_rollout_index"]) for row in inputs]
    assert sorted(places) == [(task, number) for task in (0, 1) for number in range(8)]
    assert places == [(row["_ng_task_index"], row["_ng_rollout_index"]) for row in results]
    first = results[0]
    assert first["judge"] == {"ok": True} and first["reward"] == 1.0
    assert first["response"]["output"][1]["name"] == "look_up"
    assert first["responses_create_params"] == inputs[0]["responses_create_params"]


def test_a_run_without_its_tasks_is_refused_and_nothing_is_written(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "data" / "validation.jsonl").unlink()
    with pytest.raises(GymexpError, match="--gym needs the rows of the tasks"):
        export(run, tmp_path / "x.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
