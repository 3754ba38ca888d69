"""What is said of a run during which somebody set the clock."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest

from gymexp.processes import clock
from gymexp.record.run_state import RunState, process_lives, read_run, wall_seconds

NOW, HOUR = 1_800_000_000.0, 3600.0


@pytest.mark.parametrize("set_by", [-HOUR, 0.0, HOUR])
def test_a_process_that_runs_is_known_whatever_became_of_the_clock(set_by, monkeypatch):
    """The kernel counts from its own start, and what a clock makes of that moves with the clock."""
    said = clock.this_process()
    then = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: then(self) + set_by)
    assert process_lives(said) is True
    assert process_lives(said | {"ticks": said["ticks"] - 500}) is False, "another one of its number"


@pytest.mark.parametrize("set_by", [-HOUR, HOUR])
def test_seconds_since_the_start_do_not_follow_the_clock(set_by, monkeypatch):
    really = time.time() - psutil.Process().create_time()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + set_by)
    assert clock.since_start() == pytest.approx(really, abs=10)


def test_a_clock_that_is_set_forward_makes_no_run_longer(tmp_path):
    """As a controller writes them: with the seconds since its start, which no setting of a clock changes."""
    lines: list[dict] = [{"time": NOW, "seconds": 3.0, "event": "start"}, {"time": NOW + 9, "seconds": 12.0}]
    lines += [{"time": NOW + 50 + HOUR, "seconds": 53.0, "event": "end"}]
    again = [{"time": NOW + 2 * HOUR, "seconds": 2.0, "event": "start"}]
    (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *again]))
    (tmp_path / "status.json").write_text(json.dumps({"seconds": 22.0, "time": NOW}))
    assert wall_seconds(read_run(tmp_path)) == pytest.approx(50 + 20)


def test_a_start_that_was_killed_counts_to_what_it_logged_last(tmp_path):
    lines = [{"time": NOW, "seconds": 3.0, "event": "start"}, {"time": NOW + 9, "seconds": 12.0}]
    lines += [
        {"time": NOW + HOUR, "seconds": 2.0, "event": "start"},
        {"time": NOW + HOUR + 5, "seconds": 7.0},
    ]
    (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    logged = [{"step": 1, "time": NOW + 100}, {"step": 2, "time": NOW + HOUR + 70}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    assert wall_seconds(read_run(tmp_path)) == pytest.approx(100 + 70)


def test_spans_of_steps_whose_seconds_are_their_own_change_nothing(tmp_path):
    lines = [
        {"time": NOW, "seconds": 3.0, "event": "start"},
        {"time": NOW + 5, "seconds": 900.0, "span": "update", "step": 1},
        {"time": NOW + 50, "seconds": 53.0, "event": "end"},
        {"time": NOW + 49, "seconds": 0.1, "span": "save", "step": 1},
    ]
    (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert wall_seconds(read_run(tmp_path)) == pytest.approx(50)


def write(run: Path, *lines: tuple[float, str | None]) -> RunState:
    timeline = [
        {"time": NOW + at} | ({"event": event} if event else {"phase": "train"}) for at, event in lines
    ]
    (run / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timeline))
    return read_run(run)


@pytest.mark.parametrize(
    ("lines", "least", "most"),
    [
        ([(0, "start"), (10, None), (60, "end")], 60, 60),
        ([(0, "start"), (10, None), (20 - HOUR, None), (60 - HOUR, "end")], 10, 60),
        ([(0, "start"), (10, None), (5, "end")], 5, 10),
        ([(0, "start"), (50, "end"), (-HOUR, "start"), (30 - HOUR, "end")], 50, 80),
        ([(-HOUR, None)], 0, 0),
    ],
)
def test_how_long_a_run_took_is_never_less_than_nothing_nor_more_than_it_was(lines, least, most, tmp_path):
    assert least <= wall_seconds(write(tmp_path, *lines)) <= most
