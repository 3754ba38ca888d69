"""Measures when each phase of training began and how long it took, without gaps between the phases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

_MIN_S = 0.001  # shorter spans are not reported: they would only show where one phase ends within another


class Spans:
    """The phases of training, of which one goes on at a time: a phase within another interrupts it.

    Each stretch of a phase is a span: {"time": its start in seconds since 1970, "seconds": its duration,
    which does not depend on the wall clock, "span": the phase, "step": the optimizer step of the phase}.
    """

    def __init__(self) -> None:
        self.report: Callable[[dict[str, Any]], None] = lambda span: None
        self._open: list[tuple[str, int]] = []  # the phases that have begun, with their steps
        self._time = self._began = 0.0  # of the current span: by the wall clock, and by the monotonic clock

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Measures the block as a phase."""
        self.begin(name, step)
        try:
            yield
        finally:
            self.end()

    def begin(self, name: str, step: int) -> None:
        """Begins a phase. step: a phase within another one belongs to that one's step instead."""
        self._close()
        self._open.append((name, self._open[-1][1] if self._open else step))

    def end(self) -> None:
        """Ends the phase that began last, if there is one; the one around it goes on."""
        self._close()
        if self._open:
            self._open.pop()

    def end_all(self) -> None:
        """Ends all phases, after an exception."""
        while self._open:
            self.end()

    def _close(self) -> None:
        now = time.monotonic()
        seconds = now - self._began
        if self._open and seconds >= _MIN_S:
            name, step = self._open[-1]
            times = {"time": round(self._time, 3), "seconds": round(seconds, 4)}
            self.report(times | {"span": name, "step": step})
        self._time, self._began = time.time(), now


class StepSpans(TrainerCallback):
    """Measures what a step does beside its other phases, from its first micro-batch to the optimizer's step,
    as its `update`."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._spans.begin("update", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._spans.end()
