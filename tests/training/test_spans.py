"""One phase goes on at a time; what a phase within another takes is missing from that one."""

from __future__ import annotations

from typing import Any

import pytest

from gymexp.training.spans import Spans


@pytest.fixture
def clock(monkeypatch):
    """A function that lets seconds pass; the wall clock is an hour ahead of the monotonic one."""
    now = [100.0]
    monkeypatch.setattr("gymexp.training.spans.time.monotonic", lambda: now[0])
    monkeypatch.setattr("gymexp.training.spans.time.time", lambda: now[0] + 3600)

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def spans_of(spans: Spans) -> list[Any]:
    reported: list[dict[str, Any]] = []
    spans.report = reported.append
    return reported


def test_the_spans_of_a_step_follow_each_other_and_belong_to_it(clock):
    spans = Spans()
    reported = spans_of(spans)
    spans.begin("update", 3)
    clock(1)
    with spans.phase("logprobs", 99), spans.phase("rollout", 99):
        clock(2)
    clock(0.0004)
    spans.end()
    clock(5)
    with spans.phase("evaluation", 3):
        clock(4)
    assert reported == [
        {"time": 3700.0, "seconds": 1.0, "span": "update", "step": 3},
        {"time": 3701.0, "seconds": 2.0, "span": "rollout", "step": 3},
        {"time": 3708.0, "seconds": 4.0, "span": "evaluation", "step": 3},
    ], "none of less than a millisecond, and none between phases"


def test_an_exception_ends_its_phases_and_later_ones_are_no_part_of_them(clock):
    spans = Spans()
    reported = spans_of(spans)
    spans.begin("update", 7)
    with pytest.raises(KeyError), spans.phase("rollout", 7):
        clock(1)
        raise KeyError
    clock(1)
    spans.end_all()
    spans.end()
    with spans.phase("save", 6):
        clock(1)
    assert [(span["span"], span["step"]) for span in reported] == [("rollout", 7), ("update", 7), ("save", 6)]


def test_a_slow_report_does_not_move_the_next_span(clock):
    spans = Spans()
    reported: list[dict[str, Any]] = []
    spans.report = lambda span: (reported.append(span), clock(0.5))[0]
    spans.begin("update", 1)
    clock(1)
    with spans.phase("rollout", 1):
        clock(2)
    assert [span["time"] for span in reported] == [3700.0, 3701.0]
