"""A whole run whose tasks are drawn by a schedule and by difficulty, killed and resumed."""

from __future__ import annotations

import json
import os
import sys

import pytest
from whole_run import UNEVALUATED

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
STEPS = 6
CURRICULUM = [
    f"trainer.max_steps={STEPS}",
    "dataset.schedule={0:{sudoku:1,workplace:0},4:{sudoku:1,workplace:1}}",
    "dataset.sampling=difficulty",
    *(f"env.{env}.data.train_size=4" for env in ("sudoku", "workplace")),
    "env.workplace.replicas=auto",
    *UNEVALUATED,
]


def test_a_run_that_is_killed_and_resumed_plays_the_tasks_of_an_undisturbed_one(started, gym_python):
    undisturbed, killed = started("undisturbed", *CURRICULUM), started("killed", *CURRICULUM)
    killed.wait_for_step(3)
    killed.process.kill()
    killed.process.wait()
    killed_after = killed.steps()[-1]
    again = started("killed", resume=True)
    assert again.ended_cleanly() == 0, again.said
    assert f"step 1/{STEPS}" not in again.said and killed_after < STEPS, "it was killed on the way"
    assert undisturbed.ended_cleanly() == 0, undisturbed.said
    played = [undisturbed.task_keys(step) for step in range(1, STEPS + 1)]
    assert [killed.task_keys(step) for step in range(1, STEPS + 1)] == played

    # Four tasks a step; after n steps workplace has n/4 of sudoku's weight, up to the same.
    office = [sum(key.startswith("workplace") for key in keys) / 16 for keys in played]
    assert office[0] == 0
    due = [n / 4 / (1 + n / 4) if n < 4 else 1 / 2 for n in range(STEPS)]
    assert all(abs(sum(office[:n]) - sum(due[:n])) * 4 < 1 for n in range(STEPS + 1))
    entries = [entry for entry in undisturbed.metrics() if "loss" in entry]
    assert [entry["workplace/share"] for entry in entries] == office
    assert [entry["workplace/weight"] for entry in entries] == pytest.approx(due)
    mix = json.loads((undisturbed.directory / "data" / "mix.json").read_text())
    assert mix["sampling"] == "difficulty" and mix["schedule"]["4"] == {"sudoku": 1, "workplace": 1}
    assert mix["training"]["drawn"]["workplace"] == sum(office) * 4

    # The first step plays all of sudoku's tasks. The next one begins with those that had different rewards.
    rewards: dict[str, set[float]] = {}
    for line in undisturbed.rollouts("step-000001"):
        rewards.setdefault(line["rollout"]["task"]["key"], set()).add(line["rollout"]["reward"])
    assert len(rewards) == 4
    mixed = {key for key, values in rewards.items() if len(values) > 1}
    second = [key for key in played[1][::4] if key.startswith("sudoku")]
    assert set(second[: len(mixed)]) <= mixed
    resting = [entry["sudoku/resting"] for entry in entries]
    assert resting[0] == 0 and max(resting) > 0

    # The workplace with its several turns is the slower one once it has tasks, so it gets another replica.
    assert max(entry.get("workplace/replicas", 0) for entry in entries) <= len(os.sched_getaffinity(0))
    if len(os.sched_getaffinity(0)) > 1:
        assert "env.workplace has 2 replicas from now on, 1 before" in undisturbed.log("trainer")
