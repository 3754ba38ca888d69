"""What a run shows: plain lines where no terminal is, a panel where one is, and how long it will take."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from gymexp.view import progress
from gymexp.view.progress import View, duration
from gymexp.view.table import held_out_table

LOGS = {
    "loss": 0.1,
    "reward": 0.5,
    "sudoku/reward": 0.25,
    "sudoku/success": 0.2,
    "sudoku/rollouts": 8,
    "sudoku/turns": 1.0,
    "sudoku/failed": 0.0,
    "workplace/reward": None,
    "workplace/rollouts": 8,
    "workplace/failed": 1.0,
    "eval_sudoku/reward": 0.75,
    "eval_sudoku/rollouts": 8,
    "eval_sudoku/turns": 1.0,
    "time/step": 4.0,
    "time/rollout": 3.0,
    "completions/mean_length": 20.0,
}


class Clock:
    """Stands in for the time module of the view."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def train(step: int, max_steps: int = 10) -> dict:
    return {"phase": "train", "step": step, "max_steps": max_steps}


def test_without_a_terminal_a_run_is_plain_lines_one_a_step(clock):
    out = io.StringIO()
    view = View(out)
    with view:
        view.update({"phase": "evaluate", "step": 0})
        view.update(train(0))
        clock.now += 4.0
        logs = {"sudoku/reward": 0.25, "sudoku/rollouts": 8, "time/step": 4.0, "time/rollout": 3.0}
        view.update(train(1))
        view.log(1, logs)
        view.log(1, {"completions/mean_length": 20.0})  # of TRL's own alone there is nothing to say
    assert out.getvalue().splitlines() == [
        "evaluate",
        "step 1/10  reward: sudoku 0.250  4.0 s a step (3.0 rollouts)  0:36 left",
    ]
    assert "\x1b" not in out.getvalue()


def test_an_evaluation_says_that_it_is_held_out(clock):
    out = io.StringIO()
    view = View(out)
    view.update(train(3))
    view.log(2, {"eval_sudoku/reward": 0.75, "eval_sudoku/rollouts": 8})
    view.log(2, {"sudoku/reward": 0.5, "sudoku/rollouts": 8})
    view.log(3, {"sudoku/reward": 0.25, "sudoku/rollouts": 8})
    assert out.getvalue().splitlines() == [
        "step 2/10  held-out reward: sudoku 0.750",
        "step 2/10  reward: sudoku 0.500",
        "step 3/10  reward: sudoku 0.250",
    ], "each with its own step, whatever the newest is"


def test_what_is_said_is_never_read_as_markup():
    out = io.StringIO()
    View(out).say("env must name at least one environment, got []: say e.g. env=[sudoku] [red]")
    assert out.getvalue() == "env must name at least one environment, got []: say e.g. env=[sudoku] [red]\n"


def test_the_time_left_is_known_after_the_first_step_and_follows_the_pace(clock):
    view = View(io.StringIO())
    view.update(train(0))
    assert view.time_left() is None
    clock.now += 5.0
    view.update(train(1))
    assert view.time_left() == pytest.approx(45.0)
    clock.now += 15.0
    view.update(train(2))
    assert view.time_left() == pytest.approx(80.0)


def test_the_time_left_of_a_resumed_run_counts_its_own_steps_alone(clock):
    view = View(io.StringIO())
    view.update(train(6))
    clock.now += 10.0
    view.update(train(8))
    assert view.time_left() == pytest.approx(10.0)


def test_the_panel_shows_the_environments_the_flow_and_what_is_waited_for(clock):
    view = View(io.StringIO())
    view.log(3, LOGS)
    view.update(train(3) | {"done": 12, "total": 64, "in_flight": 8, "failed": 1, "retried": 2})
    view.services({"sudoku-agent": "ready", "gateway": "down", "trainer": "stopped"})
    console = Console(file=io.StringIO(), width=140)
    console.print(view)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"train\s+step 3/10", shown)
    assert "rollouts 12/64  in flight 8  retried 2  failed 1" in shown
    assert re.search(r"sudoku\s+0\.750\s+0\.250\s+0\.200", shown)
    assert re.search(r"workplace\s+–\s+–", shown)
    assert "waiting for gateway\n" in shown


def test_on_a_terminal_the_panel_is_drawn_and_taken_away(clock, monkeypatch):
    monkeypatch.setattr(View, "__rich__", lambda self: "the panel")
    out = io.StringIO()
    view = View(out)
    view._console = Console(file=out, force_terminal=True, width=80)
    with view:
        view.say("a line that stays")
    shown = out.getvalue()
    assert shown.index("a line that stays") < shown.index("the panel")
    assert shown.endswith("\x1b[2K"), "the panel's line is wiped"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_durations_read_as_a_clock(seconds, said):
    assert duration(seconds) == said


def test_the_table_at_the_end_shows_before_after_and_change():
    held_out = {"sudoku": {"reward": [0.25, 0.75], "turns": [1, 1]}, "workplace": {"reward": [None, 0.5]}}
    lines = held_out_table({"held_out": held_out}, {}).splitlines()
    assert [line.split() for line in lines] == [
        ["held-out", "reward", "before", "after", "change"],
        ["sudoku", "0.250", "0.750", "+0.500"],
        ["workplace", "–", "0.500", "–"],
    ]


@pytest.mark.parametrize("held_out", [{}, {"sudoku": {"failed": [0.0, 1.0]}}])
def test_the_table_copes_with_nothing_evaluated_and_with_an_evaluation_that_only_failed(held_out):
    assert "nan" not in held_out_table({"held_out": held_out}, {})
