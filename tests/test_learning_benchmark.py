"""benchmarks/learning.py: run directories of several seeds become a page whose numbers are theirs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent


def build_config(seed: int) -> dict[str, Any]:
    return {
        "name": "small",
        "seed": seed,
        "model": {"path": "/srv/some where/tiny", "dtype": "bfloat16"},
        "env": {"sudoku": {"config_path": "resources_servers/a/b.yaml"}},
        "dataset": {"files": ["/srv/rows.jsonl", "org/rows"]},
        "trainer": {"max_steps": 3, "logging_steps": 1},
        "gym": {"python": f"/home/user{seed}/bin/python"},
        "rollout": {"max_drift": None},
    }


def build_lines(seed: int) -> list[dict[str, Any]]:
    def evaluation(step: int, reward: float) -> dict[str, Any]:
        return {
            "step": step,
            "eval_sudoku/rollouts": 10,
            "eval_sudoku/failed": 0.0,
            "eval_sudoku/retried": 0.0,
            "eval_sudoku/token_mismatches": int(step == 0),
            "eval_sudoku/reward": reward,
        }

    steps = [
        {
            "step": step,
            "loss": 0.0,
            "sudoku/rollouts": 8.0,
            "sudoku/failed": 0.375 if (seed, step) == (1, 2) else 0.0,
            "sudoku/retried": 0.75 if (seed, step) == (1, 2) else 0.0,
            "sudoku/token_mismatches": 2.0 if (seed, step) == (1, 2) else 0.0,
            "sudoku/reward": 0.1 * step,
            "time/step": 10.0 * step + 5.0,
            "time/evaluation": 5.0,
        }
        for step in (1, 2, 3)
    ]
    steps[0]["drift"] = 0.001 * (1 + seed)
    end = {"step": 3, "train_runtime": 60.0}
    return [evaluation(0, 0.1 * (1 + seed)), *steps, end, evaluation(3, 0.1 * (5 + 2 * seed))]


def write_run(directory: Path, seed: int, **config: Any) -> Path:
    (directory / "code").mkdir(parents=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(build_config(seed) | config)))
    (directory / "overrides.yaml").write_text(f"- model.path='/srv/some where/tiny'\n- seed={seed}\n")
    (directory / "versions.txt").write_text("gymexp 0.1.0\n")
    (directory / "code" / "git-commit.txt").write_text("abc\n")
    (directory / "result.json").write_text(json.dumps({"step": 3, "stopped": False}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in build_lines(seed)))
    write_held_out(directory / "rollouts", seed)
    return directory


def write_held_out(rollouts: Path, seed: int) -> None:
    """Two tasks; the second fails after training with seed 1."""
    rollouts.mkdir()
    for step, rewards in ((0, [0.0, 0.5, 0.5]), (3, [0.25 * (1 + seed), 0.5, 1.0])):
        records = [
            {"rollout": {"task": {"key": f"sudoku/validation/{number}"}, "reward": reward}}
            for number, reward in enumerate(rewards)
        ]
        if (seed, step) == (1, 3):
            records[2] = {"task": {"key": "sudoku/validation/2"}, "cause": "timeout"}
        lines = b"".join(orjson.dumps(record) + b"\n" for record in records)
        (rollouts / f"eval-{step:06d}.jsonl.zst").write_bytes(zstandard.compress(lines))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / f"run {seed}", seed) for seed in (0, 1, 2)]


def learn(target: Path, runs: list[Path]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "learning.py", target, *runs]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refusal(target: Path, runs: list[Path]) -> str:
    result = learn(target, runs)
    assert (result.returncode, result.stdout, target.exists()) == (1, "", False)
    assert re.fullmatch(r"error: .*\n", result.stderr)
    return result.stderr


def test_three_seeds_become_a_page_with_their_means_and_sample_deviations(tmp_path, runs):
    target = tmp_path / "results" / "small"
    result = learn(target, [runs[2], runs[0], runs[1]])
    assert (result.returncode, result.stderr) == (0, "")
    page = (target / "summary.md").read_text()
    assert "| environment | seed | step 0 | step 3 | change |" in page
    # Changes of the two tasks that no run failed at: 0.5 and 0 with seed 1, 0.5 and 0 for the mean of seeds.
    # The bound of two tasks is far from any use; what is checked is that it is theirs.
    half = f"{12.7062 * 0.25:.3f}"  # the quantile of Student's t with one degree of freedom
    assert f"| sudoku | 1 | 0.200 | 0.700 | +0.500 ± {half} |" in page
    mean = "| **sudoku** | **mean** | **0.200 (0.100)** | **0.700 (0.200)** | "
    assert f"{mean}**+0.500 ± {half} (0.100)** |" in page
    for fact in (
        "Optimizer steps: 3 with each seed",
        "Rollouts: 72 in training, 60 held out",
        "Failed rollouts: 3 in training, 0 held out",
        "Attempts that failed and were made again: 6 in training, 0 held out",
        "Token mismatches, of all attempts: 2 in training, 3 held out",
        "Highest drift: 0.003 nats",
        "Median seconds a step: 20.0,",
    ):
        assert fact in page
    assert "python -m gymexp.train 'model.path=<machine>/tiny' seed=0\n" in page
    pictures = [(target / f"{name}.svg").read_bytes() for name in ("held_out", "training")]
    assert learn(target, runs).returncode == 0
    assert [(target / f"{name}.svg").read_bytes() for name in ("held_out", "training")] == pictures


def test_each_seed_keeps_its_metrics_and_loses_the_paths_of_its_machine(tmp_path, runs):
    target = tmp_path / "small"
    assert learn(target, runs).returncode == 0
    for seed, run in enumerate(runs):
        kept = target / f"seed_{seed}"
        assert (kept / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
        assert (kept / "versions.txt").read_text() == "gymexp 0.1.0\ncommit abc\n"
        last = "" if seed == 1 else "1"
        assert (kept / "held_out.csv").read_text() == (
            "task,before,after\n"
            f"sudoku/validation/0,0,{0.25 * (1 + seed):g}\n"
            "sudoku/validation/1,0.5,0.5\n"
            f"sudoku/validation/2,0.5,{last}\n"
        )
        assert (kept / "overrides.yaml").read_text() == f"- model.path=<machine>/tiny\n- seed={seed}\n"
        assert OmegaConf.load(kept / "config.yaml") == build_config(seed) | {
            "model": {"path": "<machine>/tiny", "dtype": "bfloat16"},
            "dataset": {"files": ["<machine>/rows.jsonl", "org/rows"]},
            "gym": {"python": "<machine>/python"},
        }


def test_what_an_older_run_did_not_count_is_not_said_to_be_zero(tmp_path, runs):
    for run in runs:
        metrics = run / "metrics.jsonl"
        metrics.write_text(re.sub(r'"[a-z_]+/(retried|token_mismatches)": [\d.]+, ', "", metrics.read_text()))
    assert learn(tmp_path / "small", runs).returncode == 0
    page = (tmp_path / "small" / "summary.md").read_text()
    assert "Failed rollouts: 3 in" in page
    assert "Token mismatches, of all attempts: not counted" in page


def test_what_is_not_a_set_of_finished_runs_of_one_experiment_is_refused(tmp_path, runs):
    target = tmp_path / "small"
    (tmp_path / "empty").mkdir()
    assert "RUN_DIR must hold metrics.jsonl" in refusal(target, [*runs, tmp_path / "empty"])
    again = write_run(tmp_path / "again", 1)
    assert "seed must be another one in each run, got 1 in " in refusal(target, [*runs, again])
    longer = write_run(tmp_path / "longer", 3, trainer={"max_steps": 4, "logging_steps": 1})
    assert "trainer.max_steps must be the same in all runs, got 3 in " in refusal(target, [*runs, longer])
    other = write_run(tmp_path / "other", 3, env={"workplace": {}})
    assert "env.sudoku.config_path must be the same in all runs" in refusal(target, [*runs, other])
    rare = write_run(tmp_path / "rare", 3, trainer={"max_steps": 3, "logging_steps": 10})
    assert "trainer.logging_steps must be 1, got 10" in refusal(target, [rare])
    metrics = runs[1] / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if '"step": 0' not in line))
    assert "env.sudoku must have been evaluated twice or more in each run, got 1" in refusal(target, runs)
    (runs[0] / "result.json").write_text(json.dumps({"step": 2, "stopped": True, "held_out": {}}))
    assert "RUN_DIR must be a finished run, got one stopped at step 2" in refusal(target, runs)


def test_a_page_with_runs_that_are_not_named_is_refused(tmp_path, runs):
    (tmp_path / "small" / "seed_7").mkdir(parents=True)
    assert "must hold only these runs, got seed_7 as well" in learn(tmp_path / "small", runs).stderr
