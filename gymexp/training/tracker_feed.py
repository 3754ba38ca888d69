"""Sends metrics and rollouts to the tracker from a thread of its own. Training waits for no tracker, and a
tracker that fails ends no run: the user is told once."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from gymexp.config.redaction import without_secrets
from gymexp.config.schema import RunConfig
from gymexp.errors import GymexpError
from gymexp.rollout.outcome import Outcome
from gymexp.training.rollout_sample import choose
from gymexp.training.tracker_runs import Place, TrackerRun, open_run

log = logging.getLogger(__name__)
_MAX_UNSENT = 200  # entries; a full queue drops the newest
_FINISH_TIMEOUT_S = 60.0
_MAX_ERROR = 300  # characters


class TrackerFeed(TrainerCallback):
    """Sends each log entry, and a sample of each file of rollouts. Only the first rank has this callback."""

    def __init__(
        self, kind: str, run: TrackerRun, num_rollouts: int, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """kind, num_rollouts: `tracker.kind` and `tracker.rollouts`. tell: shows the user a line, which the
        log has too."""
        self._tell = tell
        self._kind = kind
        self._run = run
        self._num_rollouts = num_rollouts
        self._reported = False
        self._unsent: queue.Queue[Callable[[], None] | None] = queue.Queue(_MAX_UNSENT)
        self._thread = threading.Thread(target=self._send, name="tracker", daemon=True)
        self._thread.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        step: int = state.global_step
        numbers = {
            name: value
            for name, value in (logs or {}).items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        if numbers:
            self._put(lambda: self._run.log(step, numbers))

    def add_rollouts(
        self, name: str, outcomes: Sequence[Outcome], advantages: Sequence[float | None] | None
    ) -> None:
        """Sends some of the outcomes of a file in rollouts/. advantages: of each; None for held-out ones."""
        # Only the chosen ones wait in the queue, so that a slow tracker keeps no batch in memory.
        if chosen := choose(outcomes, self._num_rollouts, name, advantages):
            step = int(name.rpartition("-")[2])
            self._put(lambda: self._run.log_rollouts(step, name, chosen))

    def close(self, failed: bool) -> None:
        """Waits until the tracker has everything, for a minute at most. failed: how the run ends there."""
        until = time.monotonic() + _FINISH_TIMEOUT_S
        with contextlib.suppress(queue.Full):
            self._unsent.put(lambda: self._run.finish(failed), timeout=_FINISH_TIMEOUT_S)
            self._unsent.put(None, timeout=max(0.0, until - time.monotonic()))
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._report(f"does not answer, and may lack the end of the run after {_FINISH_TIMEOUT_S:.0f} s")

    def _put(self, send: Callable[[], None]) -> None:
        try:
            self._unsent.put_nowait(send)
        except queue.Full:
            self._report("is too slow, and misses entries")

    def _send(self) -> None:
        while send := self._unsent.get():
            try:
                send()
            except Exception as error:
                self._report(f"failed: {_one_line(error)}")

    def _report(self, what: str) -> None:
        """Tells the first failure alone: a tracker that cannot be reached fails at every step."""
        if not self._reported:
            text = f"tracker={self._kind} {what}. The run goes on, and its directory has everything"
            log.warning("%s", text)
            self._tell(text)
        self._reported = True


def open_feed(
    config: RunConfig, place: Place, tell: Callable[[str], None] = lambda _: None
) -> TrackerFeed | None:
    """Opens the run at the tracker; None without a tracker. tell: of `TrackerFeed`.

    Raises GymexpError if a new run cannot begin there. A resumed run goes on without the tracker.
    """
    kind = config.tracker.kind
    try:
        run = open_run(config, place)
    except Exception as error:
        if place.step is not None:
            text = f"tracker={kind} failed: {_one_line(error)}. The run goes on without it"
            log.warning("%s", text)
            tell(text)
            return None
        fix = (
            "Log in with `wandb login`, or say tracker.mode=offline"
            if kind == "wandb"
            else "Or say tracker=none"
        )
        raise GymexpError(f"tracker={kind}: {_one_line(error)}. {fix}") from error
    return TrackerFeed(kind, run, config.tracker.rollouts, tell) if run else None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return without_secrets(text)[:_MAX_ERROR].rstrip(".")
