"""Whole evaluations whose process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from whole_run import NO_WAY_OUT, ROOT, Run

from gymexp.rollout.rollout_files import read_index

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
SUDOKU = ["env=[sudoku]", "env.sudoku.data.train_size=16", "env.sudoku.data.validation_size=8"]
ONE_BY_ONE = ["engine=hf", "engine.max_batch_size=1", "env.sudoku.max_concurrency=1"]
TINY = [*SUDOKU, "model=tiny", *ONE_BY_ONE, "evaluation.samples=8"]


class Evaluation(Run):
    """An evaluation in a process of its own."""

    def __init__(self, directory: Path, *overrides: str) -> None:
        self.directory = directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        self.output = directory.parent / f"{directory.name}.{time.monotonic_ns()}.txt"
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gymexp.evaluate", *overrides],
                stdout=out,
                stderr=out,
                cwd=ROOT,
                env=os.environ | NO_WAY_OUT,
                start_new_session=True,
            )
        self.watch()

    def landed(self) -> int:
        """The bytes of what it has scored and not written yet."""
        path = self.directory / "landing" / "eval-000000.jsonl.zst"
        return path.stat().st_size if path.exists() else 0

    def num_scored(self) -> int:
        return sum(row["reward"] is not None for row in read_index(self.directory / "rollouts"))


@pytest.fixture
def evaluated() -> Iterator[Callable[..., Evaluation]]:
    """Starts or resumes an evaluation; what a failed test leaves of it is ended."""
    made: list[Evaluation] = []

    def start(directory: Path, *overrides: str) -> Evaluation:
        words = [*overrides, f"output_dir='{directory}'"] if overrides else [f"resume='{directory}'"]
        made.append(Evaluation(directory, *words))
        return made[-1]

    yield start
    for one in made:
        one.kill()


def test_an_evaluation_whose_process_is_killed_names_it_and_plays_the_rest(
    evaluated, folder, gym_python, fault
):
    directory = folder / "killed"
    one = evaluated(directory, *TINY)
    one.wait_for(one.landed)
    blow = fault("An evaluation's evaluator is killed")
    one.server("evaluator").send_signal(signal.SIGKILL)
    assert one.ended_cleanly() == 1, one.said
    blow.over()
    assert "error: evaluator was ended by SIGKILL" in one.said, one.said
    assert not (directory / "results.json").exists() and one.landed()
    again = evaluated(directory)
    assert again.ended_cleanly() == 0, again.said
    assert "rollouts are scored already" in again.log("evaluator") and again.num_scored() == 64
