"""Whole runs whose processes are stopped and continued, or hang, and whose terminal goes away."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from whole_run import OVERRIDES, ROOT, UNEVALUATED, Run, steps_of

from gymexp.training import checkpoints

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
SUDOKU = ["env=[sudoku]", "env.sudoku.data.train_size=64", "env.sudoku.data.validation_size=8"]
SHORT = [*(o for o in OVERRIDES if "workplace" not in o), *SUDOKU, *UNEVALUATED]
QUICK = ["gym.health_interval_s=0.5", "gym.health_timeout_s=4"]


def part(run: Run, what: str) -> psutil.Process:
    """The run's process whose command has `what` in it."""
    found = [p for p in run.left() if what in " ".join(p.cmdline())]
    return min(found, key=psutil.Process.create_time)  # what it has forked has its command line


def test_a_run_whose_command_was_stopped_and_continued_goes_on(started, gym_python, fault):
    """Ctrl-Z and fg, for longer than any health check waits."""
    run = started("suspended", *SUDOKU, *UNEVALUATED, *QUICK)
    run.wait_for_step(1)
    stopped = fault("The command is stopped and continued")
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(15)
    run.process.send_signal(signal.SIGCONT)
    run.wait_for(lambda: "step 4/4" in run.said)
    stopped.over()
    assert run.ended_cleanly() == 0, run.said
    assert "ending it" not in run.said and "starting it again" not in run.said
    said = re.findall(r"^step (\d)/4", run.said, re.MULTILINE)
    assert said == ["1", "2", "3", "4"], "each once, whoever was stopped meanwhile"


def test_a_run_that_is_suspended_as_a_whole_goes_on(started, gym_python, fault):
    """As `scontrol suspend` does it, and whoever closes a laptop's lid."""
    run = started("whole", *SUDOKU, *UNEVALUATED, *QUICK)
    run.wait_for_step(1)
    suspended = fault("The whole run is suspended")
    everyone = [psutil.Process(run.process.pid), *run.left()]
    for process in everyone:
        process.suspend()
    time.sleep(15)
    for process in reversed(everyone):
        process.resume()
    run.wait_for(lambda: "step 4/4" in run.said)
    suspended.over()
    assert run.ended_cleanly() == 0, run.said
    assert run.steps() == [1, 2, 3, 4]
    assert "ending it" not in run.said and "starting it again" not in run.said
    assert re.findall(r"^step (\d)/4", run.said, re.MULTILINE) == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("row", "what", "name"),
    [
        ("The trainer hangs", "gymexp.training.trainer_process", "trainer"),
        ("NeMo Gym's host hangs", "gym/host.py", "gym-host"),
    ],
    ids=["trainer", "gym-host"],
)
def test_a_part_without_which_nothing_goes_on_is_ended_when_it_hangs_and_the_run_says_which(
    started, gym_python, fault, row, what, name
):
    run = started(f"hung-{name}", *SUDOKU, *UNEVALUATED, *QUICK, "trainer.max_steps=1000")
    run.wait_for_step(3)  # with a checkpoint every two
    part(run, what).suspend()
    hangs = fault(row)
    assert run.ended_cleanly() == 1, run.said
    assert hangs.over() < 60
    assert f"error: {name} " in run.said and "and was ended" in run.said
    newest = checkpoints.latest(run.directory / "checkpoints")
    assert newest is not None
    if name == "gym-host":
        assert checkpoints.step_of(newest) == max(run.steps()), "the trainer saved before the end"


def test_asked_to_end_a_run_whose_trainer_hangs_ends(started, gym_python, fault):
    run = started("hung-at-the-end", *SUDOKU, *UNEVALUATED, "trainer.max_steps=1000")
    run.wait_for_step(2)
    part(run, "gymexp.training.trainer_process").suspend()
    asked = fault("The trainer hangs, then SIGTERM")
    run.process.send_signal(signal.SIGTERM)
    assert run.ended_cleanly() == 128 + signal.SIGTERM, run.said
    assert asked.over() < 40
    assert "error: ended by SIGTERM before it could save; go on with: " in run.said


def test_a_run_that_is_asked_to_end_while_it_loads_ends_at_once(started, gym_python, fault):
    run = started("loading", *SUDOKU)
    run.wait_for(lambda: "load model" in run.said)
    asked = fault("SIGTERM while the policy loads")
    run.process.send_signal(signal.SIGTERM)
    assert run.ended_cleanly() == 128 + signal.SIGTERM, run.said
    assert asked.over() < 15
    assert "error: ended by SIGTERM at once; go on with: " in run.said


def test_a_terminal_that_is_closed_ends_a_run_with_a_checkpoint(started, gym_python, fault):
    run = started("hung-up", *SUDOKU, *UNEVALUATED, "trainer.max_steps=1000")
    run.wait_for_step(2)
    closed = fault("The terminal is closed")
    run.process.send_signal(signal.SIGHUP)
    assert run.ended_cleanly() == 128 + signal.SIGHUP, run.said
    closed.over()
    newest = checkpoints.latest(run.directory / "checkpoints")
    assert newest is not None and checkpoints.step_of(newest) == max(run.steps())


def test_under_nohup_a_terminal_may_close_and_whoever_reads_may_leave(folder, gym_python, fault):
    directory = folder / "unread"
    command = [sys.executable, "-m", "gymexp.train", f"hydra.run.dir='{directory}'", *SHORT]
    process = subprocess.Popen(
        ["nohup", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout
        for line in process.stdout:
            if "load model" in line:
                break
        left = fault("Whoever reads the output leaves")
        process.stdout.close()  # as `| head` does
        process.send_signal(signal.SIGHUP)
        until = time.monotonic() + 300
        while not steps_of(directory):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        left.over()
        assert process.wait(300) == 0
    finally:
        process.kill()
    assert steps_of(directory) == [1, 2, 3, 4]
    assert (directory / "model" / "model.safetensors").exists()
