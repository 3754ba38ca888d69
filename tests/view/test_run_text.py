"""A run as text, and followed: its logs come late, are cut short, and end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from written_runs import write_run

from gymexp.view.run_text import Tail, follow, look, run_text


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that goes on: its controller is this process."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").write_text("name: tiny\n")
    say(tmp_path, phase="train", step=1, max_steps=3, services={"gateway": "ready"})
    return tmp_path


def say(run: Path, pid: int | None = None, outcome: str | None = None, **facts) -> None:
    status = {
        "pid": pid or os.getpid(),
        "host": socket.gethostname(),
        "began": time.time(),
        "ended": outcome and (outcome if outcome in ("finished", "requeued") else "failed"),
        "outcome": outcome,
    }
    (run / "status.json").write_text(json.dumps(status | facts))


def put(run: Path, log: str, text: str) -> None:
    with (run / "logs" / log).open("a") as file:
        file.write(text)


def test_only_new_and_whole_lines_are_told_with_their_process(run):
    put(run, "gateway.log", "before\n")
    tail = Tail(run / "logs")
    assert list(tail.lines()) == [("gateway", "before")]
    put(run, "gateway.log", "half a ")
    put(run, "trainer.log", "a log that came later\n")
    assert list(tail.lines()) == [("trainer", "a log that came later")]
    put(run, "gateway.log", "line\n")
    assert list(tail.lines()) == [("gateway", "half a line")]


def test_of_a_long_log_its_end_is_told_from_the_start_of_a_line(run):
    put(run, "trainer.log", "".join(f"line {number}\n" for number in range(10_000)))
    told = [line for _, line in Tail(run / "logs").lines()]
    assert told[-1] == "line 9999"
    assert 100 < len(told) < 300 and all(line.startswith("line ") for line in told)


def test_a_log_that_is_cut_short_begins_again(run):
    put(run, "trainer.log", "one\ntwo\n")
    tail = Tail(run / "logs")
    list(tail.lines())
    (run / "logs" / "trainer.log").write_text("new\n")
    assert list(tail.lines()) == [("trainer", "new")]


def test_a_run_is_followed_through_its_steps_to_its_end(run):
    class Said:
        def __init__(self) -> None:
            self.lines: list[str] = []
            self.steps: list[int] = []

        def say(self, line: str) -> None:
            self.lines.append(line)

        def update(self, facts: dict) -> None:
            pass

        def log(self, step: int, logs: dict) -> None:
            assert logs["loss"] == 0.5
            self.steps.append(step)

    def next_thing(_: float) -> None:
        match len(said.steps):
            case 0 | 1 as done:
                put(run, "trainer.log", f"after {done}\n")
                with (run / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": done + 1, "loss": 0.5}) + "\n")
            case _:
                (run / "result.json").write_text(json.dumps({"step": 2, "stopped": False, "held_out": {}}))
                say(run, outcome="finished", phase="stop", step=2, max_steps=2)

    said = Said()
    end = follow(run, said, sleep=next_thing)
    assert (end.state, said.steps) == ("finished", [1, 2])
    assert said.lines == ["trainer: after 0", "trainer: after 1"]


def test_where_a_run_is_and_its_servers_are_told(run):
    text = run_text(look(run))
    assert "running" in text and "1/3" in text and "gateway ready" in text


@pytest.mark.parametrize("name", ["metrics.jsonl", "timeline.jsonl", "result.json", "status.json"])
def test_a_run_whose_files_a_full_disk_cut_short_is_told_as_far_as_they_are_whole(tmp_path, name):
    path = write_run(tmp_path / "run", [])
    cut = path / name
    cut.write_bytes(cut.read_bytes()[:-20])
    lines = run_text(look(path)).splitlines()
    assert lines[1].startswith("finished")
    assert [line.split()[1] for line in lines if line.startswith("held-out")] == ["sudoku", "workplace"]


def test_a_run_whose_controller_is_gone_is_lost(run):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    say(run, pid=ended.pid, phase="train", step=1, max_steps=3)
    assert look(run).state == "lost"
