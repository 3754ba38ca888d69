"""Beside the steps: what is measured with which weights, what is written and reported, when training ends."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web
from loopback import serving
from transformers import TrainerControl

from gymexp.config.schema import EnvConfig, EvaluationConfig, ModelConfig, RunConfig
from gymexp.data.prepare import Prepared
from gymexp.rollout.outcome import Completed, Rollout, Task, Turn
from gymexp.rollout.progress import Progress
from gymexp.rollout.rollout_files import RolloutWriter, read_outcomes
from gymexp.training import callbacks
from gymexp.training.callbacks import Evaluation, MetricsFile, ProgressReporter, Steps, StopOnRequest
from gymexp.training.drawn_tasks import FixedTasks
from gymexp.training.rollout_func import Rollouts
from gymexp.training.spans import Spans

HELD_OUT = {
    name: [Task(f"{name}/validation/{i}", name, "a", {}) for i in range(3)] for name in ("maze", "sudoku")
}


class Recorder:
    """A ProgressReporter that remembers."""

    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] = []

    def report(self, **facts: Any) -> None:
        self.facts.append(facts)

    def report_log(self, step: int, logs: dict[str, Any]) -> None:
        self.facts.append({"logged": step} | logs)


class Trainer:
    """The seams that a callback knows; `happened` has what was done, in order."""

    def __init__(self, num_processes: int = 1, others_ask: float = 0.0) -> None:
        self.happened: list[Any] = []
        self.engine_has: int | None = None
        self.policy_is_at = 4
        self.stopped = False
        self.grpo = SimpleNamespace(temperature=0.8)
        self.logged: list[tuple[dict[str, float], float]] = []
        self.spans = Spans()
        self.batch_tasks = FixedTasks([])
        self.accelerator = SimpleNamespace(
            num_processes=num_processes,
            is_main_process=True,
            device=torch.device("cpu"),
            reduce=lambda tensor, reduction: {"sum": tensor + others_ask}[reduction],
        )

    def sync_weights(self) -> None:
        self.happened.append("sync")
        self.engine_has = self.policy_is_at

    def log_evaluation(self, metrics: dict[str, float], seconds: float) -> None:
        self.happened.append("log")
        self.logged.append((metrics, seconds))


class Plays:
    """In the place of `Rollouts`: every third rollout succeeds. It says what the engine held."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.calls: list[tuple[Any, ...]] = []
        self.written: dict[str, list[Any]] = {}

    def play(self, keys, step, temperature, held_out, keep):
        self.trainer.happened.append("play")
        self.calls.append((list(keys), step, temperature, held_out, self.trainer.engine_has))
        tasks = {task.key: task for some in HELD_OUT.values() for task in some}
        played = [
            Completed(Rollout(tasks[key], [Turn([1], [2, 3], [-0.1, -0.1])], float(i % 3 == 0), []))
            for i, key in enumerate(keys)
        ]
        keep(played)
        return played

    def write(self, name: str, outcomes, group_size: int) -> None:
        self.written[name] = outcomes


def evaluation(judge: Any = None, **changes: Any) -> tuple[Evaluation, Trainer, Plays, Recorder]:
    envs = {name: EnvConfig(config_path="c", agent="a") for name in HELD_OUT}
    config = RunConfig(model=ModelConfig("m", "p"), env=envs, evaluation=EvaluationConfig(**changes))
    trainer, recorder = Trainer(), Recorder()
    plays = Plays(trainer)
    one = Evaluation(config, Prepared([], HELD_OUT, {}), plays, recorder, judge)  # type: ignore[arg-type]
    one.trainer = trainer  # type: ignore[assignment]
    return one, trainer, plays, recorder


def state(step: int, max_steps: int = 10) -> Any:
    return SimpleNamespace(global_step=step, max_steps=max_steps, is_world_process_zero=True)


def test_held_out_tasks_are_played_with_the_policys_weights_of_that_step():
    one, trainer, plays, recorder = evaluation()
    metrics = one.run(4)
    assert trainer.happened == ["sync", "play", "log"]
    [(keys, step, distribution, held_out, engine_has)] = plays.calls
    assert keys == [task.key for some in HELD_OUT.values() for task in some]
    assert (step, distribution.temperature, held_out, engine_has) == (4, 0.8, True, 4)
    assert plays.written.keys() == {"eval-000004"} and len(plays.written["eval-000004"]) == 6
    assert recorder.facts == [{"phase": "evaluate", "step": 4}]
    assert metrics["eval_maze/reward"] == pytest.approx(1 / 3) and metrics["eval_sudoku/rollouts"] == 3
    assert one.newest == metrics
    [(logged, seconds)] = trainer.logged
    assert logged == metrics and 0 <= seconds == metrics["eval_seconds"] < 5


def test_how_many_held_out_tasks_and_how_warm_is_the_configurations_to_say():
    one, _, plays, _ = evaluation(num_tasks=1, temperature=0.0)
    one.run(0)
    [(keys, _, distribution, _, _)] = plays.calls
    assert keys == ["maze/validation/0", "sudoku/validation/0"] and distribution.temperature == 0.0


def test_evaluations_come_every_so_many_steps_and_not_after_the_last_which_has_its_own():
    one, _, plays, _ = evaluation(every_steps=2)
    for step in range(1, 7):
        control = TrainerControl(should_log=step % 3 == 0)
        one.on_step_end(None, state(step, max_steps=6), control)
        assert control.should_log == (step % 3 == 0), "the step's own log entry is still due"
    assert [step for _, step, *_ in plays.calls] == [2, 4]
    never, _, plays, _ = evaluation(every_steps=0)
    never.on_step_end(None, state(2), TrainerControl())
    assert plays.calls == []


def test_a_steps_log_entry_is_still_due_where_the_evaluations_own_has_taken_it_back():
    one, trainer, _, _ = evaluation(every_steps=1)
    control = TrainerControl(should_log=True)
    trainer.log_evaluation = lambda *_: setattr(control, "should_log", False)  # type: ignore[method-assign]
    one.on_step_end(None, state(1), control)
    assert control.should_log


def test_a_trial_is_judged_by_every_evaluation_between_and_keeps_why_it_is_given_up():
    reports = []

    class Judge:
        def report(self, step, held_out):
            reports.append((step, held_out["maze"]["reward"]))
            return "below the median" if step == 4 else None

    one, *_ = evaluation(judge=Judge(), every_steps=2)
    one.on_step_end(None, state(2), TrainerControl())
    assert one.pruned is None
    one.on_step_end(None, state(4), TrainerControl())
    assert one.pruned == "below the median"
    assert reports == [(2, pytest.approx(1 / 3)), (4, pytest.approx(1 / 3))]


@pytest.mark.parametrize(
    ("requested", "num_processes", "others", "ends"),
    [(False, 1, 0.0, False), (True, 1, 0.0, True), (False, 1, 1.0, False), (False, 2, 1.0, True)],
)
def test_training_ends_after_the_step_in_which_any_rank_was_asked(requested, num_processes, others, ends):
    trainer, control = Trainer(num_processes, others), TrainerControl()
    ending = StopOnRequest(lambda: requested)
    ending.trainer = trainer  # type: ignore[assignment]
    ending.on_step_end(None, state(1), control)
    assert (control.should_training_stop, trainer.stopped) == (ends, ends)


def test_a_resumed_run_takes_back_what_it_said_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3):
        first.on_log(None, state(step), None, {"loss": step / 2, "note": "text", "norm": math.nan})
    resumed = MetricsFile(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    resumed.on_log(None, state(3), None, {"loss": 9.0, "none": None})
    before = time.time()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry.pop("time") for entry in entries] == [pytest.approx(before, abs=60)] * 3
    assert entries == [
        {"step": 1, "loss": 0.5, "norm": None},
        {"step": 2, "loss": 1.0, "norm": None},
        {"step": 3, "loss": 9.0, "none": None},
    ]
    other = SimpleNamespace(global_step=4, is_world_process_zero=False)
    resumed.on_log(None, other, None, {"loss": 1.0})
    resumed.on_log(None, state(4), None, {})
    assert len(path.read_text().splitlines()) == 3


def test_a_line_that_a_full_disk_cut_short_hinders_no_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo\n{"step": 3, "loss": 1.5}\n{"step": 4, "loss"')
    resumed = MetricsFile(path, 3)
    resumed.on_log(None, state(4), None, {"loss": 2.0})
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(1, 0.5), (3, 1.5), (4, 2.0)]


def test_the_controller_is_told_of_each_step_and_its_numbers():
    recorder = Recorder()
    steps = Steps(recorder)  # type: ignore[arg-type]
    steps.on_step_begin(None, state(3), None)
    steps.on_log(None, state(4), None, {"loss": 0.5, "norm": math.inf, "note": "text"})
    steps.on_log(None, state(4), None)
    assert recorder.facts == [
        {"phase": "train", "step": 3, "max_steps": 10},
        {"step": 4, "max_steps": 10},
        {"logged": 4, "loss": 0.5, "norm": None},
        {"step": 4, "max_steps": 10},
    ]


def test_what_is_told_reaches_the_controller_all_together_and_the_newest_of_each():
    got: list[dict] = []
    there = threading.Event()

    async def progress(request: web.Request) -> web.Response:
        got.append(await request.json())
        if got[-1].get("done") == 3:
            there.set()
        return web.Response()

    app = web.Application()
    app.add_routes([web.post("/progress", progress)])
    with serving(app) as url:
        reporter = ProgressReporter(url)
        reporter.report(phase="train", step=1)
        began = time.monotonic() - 2.0
        reporter.report_collection(
            Progress(total=8, done=3, in_flight=5, failed=1, retried=2, tokens=100, began=began)
        )
        assert there.wait(10)
    rate = got[-1].pop("tokens_per_s")
    assert rate == pytest.approx(50, rel=0.1)
    counts = {"total": 8, "done": 3, "in_flight": 5, "failed": 1, "retried": 2}
    assert got[-1] == {"phase": "train", "step": 1, "entries": []} | counts


def test_each_log_entry_reaches_the_controller_once_with_its_own_step_however_quickly_they_come():
    got: list[dict] = []
    all_there = threading.Event()

    async def progress(request: web.Request) -> web.Response:
        if not refused:
            refused.append(await request.json())
            return web.Response(status=500)
        got.extend((await request.json())["entries"])
        if got and got[-1]["step"] == 5:
            all_there.set()
        return web.Response()

    refused: list[dict] = []
    app = web.Application()
    app.add_routes([web.post("/progress", progress)])
    with serving(app) as url:
        reporter = ProgressReporter(url)
        for step in range(1, 6):
            reporter.report_log(step, {"eval_a/reward": step / 10})
            reporter.report_log(step, {"a/reward": step / 5})
            reporter.report(step=step)
            time.sleep(0.05)
        assert all_there.wait(20)
    assert [(entry["step"], *entry["logs"].items()) for entry in got] == [
        (step, one) for step in range(1, 6) for one in (("eval_a/reward", step / 10), ("a/reward", step / 5))
    ]


def test_no_span_is_lost_or_sent_in_a_message_that_is_too_large_and_the_end_waits_for_the_last():
    got: dict[int, dict] = {}
    sizes = []

    async def progress(request: web.Request) -> web.Response:
        entries = (await request.json())["entries"]
        sizes.append(len(entries))
        got.update({entry["number"]: entry for entry in entries})
        return web.Response(status=500 if len(sizes) == 2 else 200)

    app = web.Application()
    app.add_routes([web.post("/progress", progress)])
    with serving(app) as url:
        reporter = ProgressReporter(url)
        for step in range(250):
            reporter.report_span({"span": "update", "step": step})
        reporter.report_log(250, {"loss": 0.5})
        reporter.close(20)
        assert not reporter._entries
    assert [got[number].get("span", {}).get("step") for number in range(1, 252)] == [*range(250), None]
    assert got[251]["logs"] == {"loss": 0.5} and max(sizes) <= 100


class Clock:
    """In the place of `time`: it stands still, and pauses take no time; it knows those of each thread."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self.pauses: defaultdict[threading.Thread, list[float]] = defaultdict(list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses[threading.current_thread()].append(seconds)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)


def test_a_controller_that_is_away_costs_the_trainer_nothing():
    threads = set(threading.enumerate())
    ProgressReporter(None).report(phase="train")
    assert set(threading.enumerate()) == threads, "other ranks have nobody to tell"
    began = time.monotonic()
    ProgressReporter("http://127.0.0.1:9").report(phase="train")
    assert time.monotonic() - began < 1
    [reporter] = set(threading.enumerate()) - threads
    assert reporter.daemon, "the trainer does not wait for it in the end"


def test_a_controller_that_answers_an_error_is_given_a_second_and_told_again(monkeypatch):
    got: list[dict] = []
    monkeypatch.setattr(callbacks, "time", clock := Clock())

    async def progress(request: web.Request) -> web.Response:
        got.append(await request.json())
        return web.Response(status=500 if len(got) == 1 else 200)

    app = web.Application()
    app.add_routes([web.post("/progress", progress)])
    with serving(app) as url:
        threads = set(threading.enumerate())
        reporter = ProgressReporter(url)
        [thread] = set(threading.enumerate()) - threads
        reporter.report(step=1)
        wait_until(lambda: len(clock.pauses[thread]) == 3)
        reporter.report(step=2)
        wait_until(lambda: len(clock.pauses[thread]) == 4)
    assert [facts["step"] for facts in got] == [1, 1, 2], "no more than that"
    assert clock.pauses[thread] == [1.0, 0.2, 0.2, 0.2], "and five times a second at most"


@pytest.mark.parametrize(("seconds", "rate"), [(8.0, 12.5), (0.5, 200.0), (0.0, 0.0), (-0.5, 0.0)])
def test_tokens_a_second_are_those_since_the_collection_began_and_none_where_no_time_has_passed(
    monkeypatch, seconds, rate
):
    monkeypatch.setattr(callbacks, "time", Clock(now=50.0))
    recorder, reporter = Recorder(), ProgressReporter(None)
    reporter.report = recorder.report  # type: ignore[method-assign]
    reporter.report_collection(Progress(total=1, began=50.0 - seconds, tokens=100))
    assert recorder.facts[0]["tokens_per_s"] == rate


def test_an_evaluation_through_rollouts_itself_has_the_same_seeds_at_every_step(tmp_path):
    """With the real `Rollouts`, which the fake above stands for."""
    samplings = []

    class Collector:
        def collect(self, tasks, some, meanwhile):
            samplings.append(some)
            return [Completed(Rollout(task, [Turn([1], [2], [-0.1])], 1.0, [])) for task in tasks]

    class Engine:
        def sampling(self, version):
            return threading.Lock()  # any context manager

        def tend(self) -> None:
            pass

    one, *_ = evaluation()
    tasks = {task.key: task for some in HELD_OUT.values() for task in some}
    one._rollouts = Rollouts(
        one._config, Collector(), tasks, RolloutWriter(tmp_path, one._config.env), Engine()
    )  # type: ignore[arg-type]
    one.run(0)
    one.run(4)
    assert samplings[0] == samplings[1]
    records = read_outcomes(tmp_path / "eval-000004.jsonl.zst")
    assert [record["rollout"]["task"]["key"] for record in records] == list(tasks)
