"""The trainer's process: in which order it does what, and what it leaves behind when it cannot go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from whole_run import ROOT

from gymexp.config.schema import EnvConfig, EvaluationConfig, RunConfig
from gymexp.record.services_file import Replica, Services
from gymexp.rollout.collect import Stopped
from gymexp.training import controlled_process, trainer_process

FAILING = """
import sys
from gymexp.training import trainer_process

def work(*_):
    import torch
    raise {error}

trainer_process.work, trainer_process.from_yaml = work, lambda path: None
trainer_process.main()
"""


@pytest.fixture
def fail(tmp_path):
    """Run the process with work that raises; what it says, and result.json."""

    def run(error: str) -> tuple[str, dict]:
        code = FAILING.format(error=error)
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 1
        result = tmp_path / "result.json"
        return done.stderr, json.loads(result.read_text()) if result.exists() else {}

    return run


def test_too_little_gpu_memory_says_which_keys_need_less_of_it(fail):
    said, result = fail("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')")
    assert "trainer.per_device_train_batch_size" in result["error"]
    assert "Tried to allocate 2.00 GiB" in result["error"]
    assert "Traceback" in said, "where, is in the log"
    assert said.rstrip().endswith(result["error"])


def test_an_error_that_nobody_foresaw_leaves_its_traceback_and_no_result(fail):
    said, result = fail("RuntimeError('no such thing')")
    assert "Traceback" in said and said.rstrip().endswith("RuntimeError: no such thing")
    assert result == {}


class Trainer:
    """Trains to `last`, or is stopped on the way."""

    def __init__(self, stops: bool = False, last: int = 6, fails: Exception | None = None) -> None:
        self.state = SimpleNamespace(global_step=0)
        self.stopped = False
        self.began_from: list[Path | None] = []
        self._stops, self._last, self._fails = stops, last, fails

    def train_from(self, resume: Path | None) -> None:
        self.began_from.append(resume)
        self.state.global_step = self._last
        self.stopped = self._stops
        if self._fails:
            raise self._fails


class Evaluation:
    """The reward is the step's number."""

    def __init__(self, pruned: str | None = None, fails: Exception | None = None) -> None:
        self.ran: list[int] = []
        self.pruned = pruned
        self.newest = {"eval_maze/reward": 99.0, "eval_maze/rollouts": 8}
        self._fails = fails

    def run(self, step: int) -> dict[str, float]:
        self.ran.append(step)
        if self._fails:
            raise self._fails
        return {"eval_maze/reward": float(step), "eval_maze/rollouts": 8, "eval_seconds": 1.0}


@pytest.fixture
def train(tmp_path):
    """`_train` with fakes: (what result.json says, the trainer, the evaluation, the run's directory)."""

    def run(trainer: Trainer, evaluation: Evaluation, resume: Path | None = None, **changes):
        config = RunConfig(evaluation=EvaluationConfig(**changes))
        directory = SimpleNamespace(path=tmp_path)
        return trainer_process._train(trainer, evaluation, config, directory, resume)  # type: ignore[arg-type]

    return run


def test_held_out_tasks_are_played_before_and_after_and_the_result_has_them_in_this_order(train, tmp_path):
    trainer, evaluation = Trainer(), Evaluation()
    assert train(trainer, evaluation) == {"maze": {"reward": [0.0, 6.0], "rollouts": [8, 8]}}
    assert evaluation.ran == [0, 6] and trainer.began_from == [None]
    assert json.loads((tmp_path / "before.json").read_text()) == {
        "eval_maze/reward": 0.0,
        "eval_maze/rollouts": 8,
        "eval_seconds": 1.0,
    }


def test_a_resumed_run_remembers_what_was_measured_before(train, tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    train(Trainer(stops=True), Evaluation())
    trainer, evaluation = Trainer(), Evaluation()
    assert train(trainer, evaluation, resume=checkpoint) == {
        "maze": {"reward": [0.0, 6.0], "rollouts": [8, 8]}
    }
    assert evaluation.ran == [6] and trainer.began_from == [checkpoint]
    (tmp_path / "before.json").unlink()
    assert train(Trainer(), Evaluation(), resume=checkpoint) == {
        "maze": {"reward": [None, 6.0], "rollouts": [None, 8]}
    }


@pytest.mark.parametrize(
    ("changes", "ran", "result"),
    [
        ({"before": False}, [6], {"maze": {"reward": [None, 6.0], "rollouts": [None, 8]}}),
        ({"after": False}, [0], {}),
        ({"before": False, "after": False}, [], {}),
    ],
)
def test_what_is_not_asked_for_is_not_played(train, tmp_path, changes, ran, result):
    evaluation = Evaluation()
    assert train(Trainer(), evaluation, **changes) == result
    assert evaluation.ran == ran
    assert (tmp_path / "before.json").exists() == (0 in ran)


def test_a_run_that_was_asked_to_end_measures_nothing_more(train):
    trainer, evaluation = Trainer(stops=True), Evaluation()
    assert train(trainer, evaluation) == {} and evaluation.ran == [0]
    for trainer, evaluation in (
        (Trainer(fails=Stopped()), Evaluation()),
        (Trainer(), Evaluation(fails=Stopped())),
    ):
        assert train(trainer, evaluation) == {}
        assert trainer.stopped, "in the middle of a step's rollouts, or of an evaluation"


def test_a_trial_that_was_given_up_is_measured_by_its_newest_evaluation(train):
    evaluation = Evaluation(pruned="below the median")
    assert train(Trainer(stops=True, last=4), evaluation) == {
        "maze": {"reward": [0.0, 99.0], "rollouts": [8, 8]}
    }
    assert evaluation.ran == [0]


def test_other_ranks_write_nothing(train, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    train(Trainer(), Evaluation())
    assert list(tmp_path.iterdir()) == []
    assert (trainer_process._rank(), trainer_process._rank("NO_SUCH")) == (1, 0)


def test_the_collector_stops_when_the_run_is_asked_to_end_and_is_closed_with_it(monkeypatch):
    made: list[Any] = []

    class Collector:
        def __init__(self, *facts: Any) -> None:
            self.facts = facts
            self.stopped = threading.Event()
            self.closed = False
            made.append(self)

        def stop(self) -> None:
            self.stopped.set()

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr("gymexp.rollout.collect.Collector", Collector)
    config = RunConfig(env={"maze": EnvConfig("c", "a")})
    replica: dict[str, Any] = {"name": "maze-0", "agent": "a", "url": "http://x", "max_steps": 3}
    replica |= {"services": ["s"], "resources": ["r"]}
    services = Services("http://c", ["http://g"], {"maze": [Replica(**replica)]}, "hf", None)
    reporter: Any = SimpleNamespace(report_collection=lambda progress: None)
    stop_requested = threading.Event()
    with ExitStack() as stack:
        collector: Any = controlled_process.open_collector(
            config, services, 77, reporter, stop_requested, stack
        )
        assert made == [collector] and not collector.stopped.is_set()
        replicas, *facts = collector.facts
        assert replicas == {"maze": [Replica(**replica)]}
        assert facts == [config.env, config.rollout, 77, "http://c", ["http://g"], reporter.report_collection]
        stop_requested.set()
        assert collector.stopped.wait(5) and not collector.closed
    assert collector.closed


def test_the_tracker_is_told_whether_the_run_has_failed(monkeypatch, tmp_path):
    closed: list[bool] = []
    opened: list[Any] = []
    told: list[str] = []
    reporter: Any = SimpleNamespace(report_remark=told.append)

    def open_feed(config: RunConfig, place: Any, tell: Any) -> Any:
        opened.append(place)
        tell(config.name)
        return SimpleNamespace(close=lambda failed: closed.append(failed)) if config.name == "n" else None

    monkeypatch.setattr("gymexp.training.tracker_feed.open_feed", open_feed)
    run: Any = SimpleNamespace(path=tmp_path / "2026")
    with ExitStack() as stack:
        assert trainer_process._open_tracker(RunConfig(name="n"), run, None, reporter, stack)
        assert trainer_process._open_tracker(RunConfig(name="none"), run, None, reporter, stack) is None
    with pytest.raises(KeyError), ExitStack() as stack:
        trainer_process._open_tracker(RunConfig(name="n"), run, 7, reporter, stack)
        raise KeyError
    assert closed == [False, True] and told == ["n", "none", "n"]
    assert [(place.path, place.name, place.step) for place in opened[::2]] == [
        (run.path, "n 2026", None),
        (run.path, "n 2026", 7),
    ]


def test_the_result_is_written_by_the_first_rank_and_nothing_keeps_the_process(tmp_path):
    code = (
        "from gymexp.training import trainer_process\n"
        "import threading, time\n"
        "sleep = threading.Thread(target=time.sleep, args=[60])\n"
        "trainer_process.work = lambda *_: sleep.start() or {'step': 3}\n"
        "trainer_process.from_yaml = lambda path: None\n"
        "trainer_process.main()\n"
    )
    for rank, written in (("1", False), ("0", True)):
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-c", code, tmp_path], env=os.environ | {"RANK": rank}, cwd=ROOT, check=True
        )
        assert time.monotonic() - began < 30
        assert (tmp_path / "result.json").exists() == written
    assert json.loads((tmp_path / "result.json").read_text()) == {"step": 3}
