"""Whole runs whose tracker breaks, or hangs, while they train."""

from __future__ import annotations

import signal

import psutil
import pytest
from whole_run import UNEVALUATED, Run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
SUDOKU = ["env=[sudoku]", "env.sudoku.data.train_size=64", "env.sudoku.data.validation_size=8"]
STEPS = 12
TRACKED = [*SUDOKU, *UNEVALUATED, f"trainer.max_steps={STEPS}", "tracker=wandb", "tracker.mode=offline"]


def trackers_own(run: Run) -> list[psutil.Process]:
    """The processes of wandb's own, which take what the trainer sends."""
    return [process for process in run.left() if process.name().startswith("wandb-core")]


def trained_in_full(run: Run, told: str) -> None:
    """Asserts that the run trained to its end, kept every number, and said once that the tracker is lost."""
    assert run.ended_cleanly() == 0, run.said
    assert run.steps() == list(range(1, STEPS + 1)), "metrics.jsonl has what was not sent"
    assert run.log("trainer").count("tracker=wandb") == 1, run.log("trainer")
    assert told in run.log("trainer")
    assert run.said.count("tracker=wandb") == 1, run.said
    assert "Traceback" not in run.log("trainer")


def test_a_tracker_that_breaks_costs_the_run_nothing(started, gym_python, fault):
    run = started("broken", *TRACKED)
    run.wait_for_step(2)
    blow = fault("The tracker breaks")
    for process in trackers_own(run):
        process.send_signal(signal.SIGKILL)
    run.wait_for(lambda: "tracker=wandb" in run.log("trainer"))
    blow.over()
    trained_in_full(run, "failed: ")


def test_a_tracker_that_hangs_delays_the_end_alone(started, gym_python, fault):
    run = started("hanging", *TRACKED)
    run.wait_for_step(2)
    blow = fault("The tracker hangs")
    for process in trackers_own(run):
        process.send_signal(signal.SIGSTOP)
    assert run.ended() == 0, run.said
    assert blow.over() < 300
    for process in trackers_own(run):  # a stopped process cannot end; it does so once it goes on
        process.send_signal(signal.SIGCONT)
        process.wait(30)
    trained_in_full(run, "does not answer, and may lack the end of the run")
