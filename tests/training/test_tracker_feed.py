"""What a tracker gets, and that one that fails, hangs or is slow neither ends nor delays a run."""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerControl, TrainerState

from gymexp.config.schema import RunConfig, TrackerConfig
from gymexp.errors import GymexpError
from gymexp.rollout.outcome import Failed, Task
from gymexp.training import tracker_feed
from gymexp.training.tracker_feed import TrackerFeed, open_feed
from gymexp.training.tracker_runs import Place


class Tracker:
    """A tracker's run; `broken` lets every call raise, `gate` lets them wait."""

    def __init__(self, broken: bool = False, gate: threading.Event | None = None) -> None:
        self.broken, self.gate = broken, gate
        self.got: list[Any] = []

    def _take(self, *facts: Any) -> None:
        if self.gate:
            self.gate.wait(20)
        if self.broken:
            raise ConnectionError("no route\nto wandb-key-0123456789abcdef0123456789abcdef01234567")
        self.got.append(facts)

    def log(self, step, numbers) -> None:
        self._take(step, dict(numbers))

    def log_rollouts(self, step, name, chosen) -> None:
        self._take(step, name, [(one.why, one.advantage) for one in chosen])

    def finish(self, failed) -> None:
        self._take("failed" if failed else "finished")


def log_entry(feed: TrackerFeed, step: int, logs: dict[str, Any]) -> None:
    """As transformers' trainer does it: an exception of the callback would end the training."""
    args: Any = SimpleNamespace(logging_strategy="no")
    handler = CallbackHandler([DefaultFlowCallback(), feed], None, None, None, None)
    handler.on_log(args, TrainerState(global_step=step), TrainerControl(), logs)


def outcomes(num: int) -> list[Failed]:
    return [Failed(Task(f"e/{n}", "e", "a", {}), "timeout", "slow") for n in range(num)]


def test_it_gets_the_names_of_metrics_jsonl_and_finite_numbers_alone():
    feed = TrackerFeed("wandb", tracker := Tracker(), 2)
    log_entry(
        feed, 3, {"sudoku/reward": 0.5, "eval_sudoku/reward": 1, "kl": float("nan"), "text": "x", "no": None}
    )
    log_entry(feed, 4, {"kl": float("inf")})
    feed.add_rollouts("step-000004", outcomes(3), [0.5, 0.5, 0.5])
    feed.add_rollouts("eval-000010", outcomes(1), None)
    feed.close(failed=True)
    assert tracker.got == [
        (3, {"sudoku/reward": 0.5, "eval_sudoku/reward": 1}),
        (4, "step-000004", [("failed", 0.5), ("random", 0.5)]),
        (10, "eval-000010", [("failed", None)]),
        ("failed",),
    ]


def test_no_rollouts_are_sent_if_none_are_wanted():
    feed = TrackerFeed("wandb", tracker := Tracker(), 0)
    feed.add_rollouts("step-000004", outcomes(3), [None] * 3)
    feed.close(failed=False)
    assert tracker.got == [("finished",)]


def test_a_tracker_that_raises_at_every_call_is_one_line_in_the_log(caplog, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "wandb-key-0123456789abcdef0123456789abcdef01234567")
    told: list[str] = []
    feed = TrackerFeed("wandb", Tracker(broken=True), 2, told.append)
    with caplog.at_level(logging.INFO):
        for step in range(5):
            log_entry(feed, step, {"loss": 0.1})
        feed.add_rollouts("step-000004", outcomes(3), [None] * 3)
        feed.close(failed=False)
    assert caplog.messages == [
        "tracker=wandb failed: no route to ***. The run goes on, and its directory has everything"
    ]
    assert told == caplog.messages, "the user sees the line of the log"


def test_a_tracker_that_fails_once_gets_what_comes_later():
    feed = TrackerFeed("wandb", tracker := Tracker(broken=True), 2)
    log_entry(feed, 1, {"loss": 0.1})
    until = time.monotonic() + 10
    while not feed._reported and time.monotonic() < until:
        time.sleep(0.01)
    tracker.broken = False
    log_entry(feed, 2, {"loss": 0.2})
    feed.close(failed=False)
    assert tracker.got == [(2, {"loss": 0.2}), ("finished",)]


def test_a_tracker_that_hangs_delays_no_step_and_the_end_by_its_limit_alone(caplog, monkeypatch):
    monkeypatch.setattr(tracker_feed, "_FINISH_TIMEOUT_S", 0.3)
    feed = TrackerFeed("wandb", tracker := Tracker(gate=(gate := threading.Event())), 2)
    began = time.monotonic()
    for step in range(1_000):
        feed.on_log(None, TrainerState(global_step=step), None, {"loss": 0.1})
    feed.close(failed=False)
    assert time.monotonic() - began < 5
    assert len(caplog.messages) == 1 and "tracker=wandb is too slow, and misses entries" in caplog.text
    gate.set()
    feed._unsent.put(None)
    feed._thread.join(10)
    assert len(tracker.got) <= 202, "the queue is bounded"


def test_a_tracker_that_hangs_at_its_end_alone_is_left(caplog, monkeypatch):
    monkeypatch.setattr(tracker_feed, "_FINISH_TIMEOUT_S", 0.2)
    feed = TrackerFeed("trackio", Tracker(gate=(gate := threading.Event())), 2)
    feed.close(failed=False)
    assert "tracker=trackio does not answer" in caplog.text
    gate.set()
    feed._thread.join(10)


def test_a_new_run_that_cannot_begin_there_is_refused_and_a_resumed_one_goes_on(
    caplog, monkeypatch, tmp_path
):
    def refuse(config: RunConfig, place: Place) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(tracker_feed, "open_run", refuse)
    configs = {kind: RunConfig(tracker=TrackerConfig(kind=kind)) for kind in ("wandb", "mlflow")}
    with pytest.raises(GymexpError, match=r"^tracker=wandb: no route\. Log in with `wandb login`, or say"):
        open_feed(configs["wandb"], Place.of(tmp_path, "n", None))
    with pytest.raises(GymexpError, match=r"^tracker=mlflow: no route\. Or say tracker=none"):
        open_feed(configs["mlflow"], Place.of(tmp_path, "n", None))
    told: list[str] = []
    assert open_feed(configs["wandb"], Place.of(tmp_path, "n", 8), told.append) is None
    assert told == caplog.messages == ["tracker=wandb failed: no route. The run goes on without it"]
