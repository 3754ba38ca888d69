"""Whole runs that are asked to end, and whose processes are killed; and how they go on."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time

import psutil
import pytest
from whole_run import STEPS, UNEVALUATED, Run, alive

from gymexp.training import checkpoints

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


def test_an_interrupted_run_goes_on_to_the_same_end_with_the_same_tasks(started, gym_python, fault):
    changes = ["evaluation.every_steps=0", "evaluation.num_tasks=8"]
    undisturbed, run = started("undisturbed", *UNEVALUATED), started("interrupted", *changes)
    run.wait_for_step(1)
    asked = fault("SIGTERM")
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.ended_cleanly() == 128 + signal.SIGTERM, run.said
    asked.over()
    command = re.search(
        r"ended by SIGTERM after step \d; go on with: python -m gymexp.train (.*)\n", run.said
    )
    assert command and shlex.split(command[1]) == [f"resume={run.directory}"]
    assert checkpoints.latest(run.directory / "checkpoints") is not None

    again = started("interrupted", resume=True)
    again.wait_for_step(3)
    asked = fault("Ctrl-C")
    os.killpg(again.process.pid, signal.SIGINT)  # as a terminal does it
    assert again.ended_cleanly() == 128 + signal.SIGINT, again.said
    asked.over()
    assert f"step 1/{STEPS}" not in again.said, "it goes on where the first start ended"
    newest = checkpoints.latest(run.directory / "checkpoints")
    assert newest is not None and checkpoints.step_of(newest) >= 3

    with (newest / "model.safetensors").open("r+b") as file:  # as large as before
        file.seek(200_000)
        damaged = bytes(255 - byte for byte in file.read(4000))
        file.seek(200_000)
        file.write(damaged)
    with run.metrics_file.open("ab") as file:  # and a disk that was full
        file.write(b'{"step": 3, "ti')
    mended = [fault("A checkpoint is damaged"), fault("Half a line in a file of the run")]
    almost = started("interrupted", resume=True)
    almost.wait_for_step(STEPS)
    [one.over() for one in mended]
    almost.wait_for(lambda: almost.status().get("phase") == "evaluate")
    asked = fault("SIGTERM during the last evaluation")
    os.kill(almost.process.pid, signal.SIGTERM)
    assert almost.ended_cleanly() == 128 + signal.SIGTERM, almost.said
    asked.over()
    assert f"ended by SIGTERM after step {STEPS}" in almost.said

    last = started("interrupted", resume=True)
    assert last.ended() == 0, last.said
    assert f"{newest.name} is not whole, its model.safetensors is damaged: going back" in almost.said
    assert (run.directory / "checkpoints" / f"damaged-{newest.name}.1").is_dir()
    assert run.steps() == list(range(1, STEPS + 1)), "what was said after the checkpoint is taken back"
    assert json.loads((run.directory / "result.json").read_text())["step"] == STEPS
    assert undisturbed.ended() == 0, undisturbed.said
    for step in range(1, STEPS + 1):
        assert run.task_keys(step) == undisturbed.task_keys(step)
    assert "workplace" in last.said.split("held-out reward")[-1], "before, from the first start, and after"
    assert not (run.directory.parent / "hydra").exists(), "resuming leaves no second run directory"

    began = time.monotonic()
    finished = started("interrupted", resume=True)
    assert finished.ended() == 0 and f"{run.directory} is finished; to train on: " in finished.said
    assert time.monotonic() - began < 60 and not finished.descendants
    other = started("interrupted", "trainer.learning_rate=1e-3", resume=True)
    assert other.ended_cleanly() == 1 and "error: trainer.learning_rate must be left out" in other.said
    longer = started("interrupted", f"trainer.max_steps={STEPS + 1}", resume=True)
    assert longer.ended() == 0, longer.said
    assert run.steps() == list(range(1, STEPS + 2))
    assert json.loads((run.directory / "result.json").read_text())["step"] == STEPS + 1


def test_a_second_signal_ends_a_run_at_once_and_in_order(started, gym_python, fault):
    run = started("twice")
    run.wait_for(lambda: "evaluate" in run.said)
    asked = fault("A second signal")
    for _ in range(2):
        os.killpg(run.process.pid, signal.SIGINT)
        time.sleep(0.3)
    assert run.ended_cleanly() in (128 + signal.SIGINT, -signal.SIGINT), (
        run.said
    )  # a shell shows 130 for both
    assert asked.over() < 10
    assert re.search(r"error: ended by SIGINT (at once|after step 0); go on with: ", run.said)
    status = json.loads((run.directory / "status.json").read_text())
    assert status["phase"] == "stop"
    assert status["outcome"].startswith("ended by SIGINT")
    assert not {"new", "starting", "ready"} & set(status["services"].values())


def test_a_directory_in_use_is_refused_and_a_killed_controller_leaves_no_process(started, gym_python, fault):
    run = started("killed", "trainer.max_steps=100", *UNEVALUATED)
    run.wait_for(lambda: (run.directory / "services.json").exists())
    refused = fault("Two commands in one run directory")
    second, resumed = started("killed"), started("killed", resume=True)
    assert second.ended_cleanly() == resumed.ended_cleanly() == 1
    refused.over()
    assert re.search(r"error: .* (holds a run already|is in use by a run)", second.said)
    assert "is in use by a run that is still going on" in resumed.said

    run.wait_for_step(1)
    assert len(run.left()) >= 8
    killed = fault("The controller is killed")
    run.process.kill()
    run.process.wait()
    while run.left():
        assert time.monotonic() - killed.began < 10, f"still there: {run.left()}"
        time.sleep(0.05)
    killed.over()

    kept = run.directory / "checkpoints"
    shutil.rmtree(kept, ignore_errors=True)
    (kept / "checkpoint-2").mkdir(parents=True)
    (kept / "checkpoint-2" / "model.safetensors").write_bytes(bytes(1000))
    run.metrics_file.write_bytes(run.metrics_file.read_bytes()[:-10])
    anew = fault("A run is killed while it writes its first checkpoint")
    again = started("killed", resume=True)
    again.wait_for(lambda: re.search(r"^step 1/100", again.said, re.MULTILINE))
    anew.over()
    assert "checkpoint-2 was not finished, and there is none before it: training begins anew" in again.said


def test_servers_and_a_gateway_that_die_or_hang_cost_no_rollout_and_a_killed_trainer_ends_the_run(
    started, gym_python, fault
):
    changes = ["gym.health_interval_s=1", "gym.health_timeout_s=3", "trainer.max_steps=1000"]
    run = started("attacked", *changes, *UNEVALUATED)
    run.wait_for_step(1)
    killed, hanging = run.server("workplace-workplace_assistant-0"), run.server("sudoku-reasoning_gym")
    blows = [fault("A server of an environment is killed"), fault("A server of an environment hangs")]
    killed.kill()
    hanging.suspend()
    run.wait_for(lambda: is_back(run, "workplace-workplace_assistant-0", killed))
    blows[0].over()
    run.wait_for(lambda: is_back(run, "sudoku-reasoning_gym", hanging))
    blows[1].over()
    gateway = run.server("gateway")
    blow = fault("The gateway is killed")
    gateway.kill()
    run.wait_for(lambda: is_back(run, "gateway", gateway))
    blow.over()
    run.wait_for_step(max(run.steps()) + 2)
    assert "workplace-workplace_assistant-0 was ended by SIGKILL; starting it again" in run.said
    assert "sudoku-reasoning_gym has not answered for" in run.said
    for entry in run.metrics():
        assert entry.get("workplace/failed", 0) == entry.get("sudoku/failed", 0) == 0
    blow = fault("The trainer is killed")
    run.server("trainer").kill()
    assert run.ended_cleanly() == 1, run.said
    blow.over()
    assert "error: trainer was ended by SIGKILL" in run.said
    assert checkpoints.latest(run.directory / "checkpoints") is not None


def test_servers_above_their_memory_budget_are_restarted_again_and_again_and_no_rollout_is_lost(
    started, gym_python, fault
):
    changes = ["env.workplace.memory_budget_mb=1", "trainer.max_steps=2", "gym.health_interval_s=0.5"]
    run = started("budget", *changes, *UNEVALUATED)
    run.wait_for(lambda: run.status().get("in_flight"))
    budget = fault("A server grows above its memory budget")
    run.wait_for(lambda: run.log("trainer").count("above its memory budget of 1 MB") >= 2)
    budget.over()
    assert run.ended_cleanly() == 0, run.said
    assert run.steps() == [1, 2]
    for entry in run.metrics():
        assert entry.get("workplace/failed", 0) == entry.get("sudoku/failed", 0) == 0
    assert "starting it again" not in run.said, "asked for, and not counted as failures"


def is_back(run: Run, name: str, old: psutil.Process) -> bool:
    """Whether a process after the old one writes the server's log, and the server is ready."""
    if alive(old) or run.status()["services"][name] != "ready":
        return False
    return any(p.pid != old.pid for p in run.left() if run.writes(p, name))
