"""What the real trainer trains if groups are played ahead of it, or in place of groups of equal rewards."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_trainer import config_of, save_policy
from transformers import TrainerCallback

from gymexp.config.schema import DatasetConfig, EnvConfig, OverlapConfig, RolloutConfig
from gymexp.data.prepare import Prepared
from gymexp.errors import RolloutError, RunDirectoryError, ServiceError
from gymexp.policy.model import load_model, load_tokenizer
from gymexp.rollout.collect import Stopped
from gymexp.rollout.outcome import Completed, Failed, Rollout, Task, Turn
from gymexp.rollout.rollout_files import RolloutWriter, read_index
from gymexp.training import arguments, checkpoints, drift, queued_tasks
from gymexp.training.drawn_tasks import FixedTasks
from gymexp.training.rollout_func import Rollouts, seed_of
from gymexp.training.trainer import PolicyTrainer

GENERATIONS, BATCH, STEPS = 2, 3, 6
TASKS = [Task(f"e/train/{n:06d}", "e", "x", {}) for n in range(4)]
SMALL = {
    "num_generations": GENERATIONS,
    "per_device_train_batch_size": GENERATIONS * BATCH,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "vllm_importance_sampling_mode": "token_truncate",
}
AHEAD = {"max_staleness": 2, "lead": 2, "order": "exact"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


class Engine:
    """Servers that sample with the version that they were sent last."""

    shared = False
    named_weights: Any = None

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self.sync = self
        self.num_tended = 0
        self.seconds = 0.0  # of an update

    def update(self, version: int, specs: Any, weights: Any) -> None:
        for _ in weights:
            pass
        time.sleep(self.seconds)
        self.version = version

    @contextmanager
    def sampling(self, version: int):
        yield

    def tend(self) -> None:
        self.num_tended += 1

    def load_since_last(self) -> dict[str, float]:
        return {"idle/engine": 0.25}


class Players:
    """Stands for the collector: plays groups in threads of its own. flat: says which tasks' rollouts have
    equal rewards. error: ends each group from now on."""

    def __init__(self, engine: Engine, flat: Callable[[str], bool], seconds: float) -> None:
        self.engine = engine
        self.ahead = self
        self.flat = flat
        self.seconds = seconds
        self.error: Exception | None = None
        self.started: list[tuple[str, int]] = []  # with the version at the start
        self.num_in_flight = 0
        self.num_forgotten = 0
        self.followed: list[int] = []
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(64)

    def start(self, tasks: Any, samplings: Any, landed: Any) -> None:
        with self.lock:
            self.started.append((tasks[0].key, self.engine.version))
            self.num_in_flight += 1
        self.pool.submit(self._play, tasks, samplings, landed, self.engine.version)

    def _play(self, tasks: Any, samplings: Any, landed: Any, version: int) -> None:
        time.sleep(self.seconds * random.Random(samplings[0].seed).random())
        with self.lock:
            self.num_in_flight -= 1
        landed(self.error or self.collect(tasks, samplings, None, version))

    def collect(self, tasks: Any, samplings: Any, meanwhile: Any, version: int | None = None) -> list[Any]:
        version = self.engine.version if version is None else version
        return [
            Completed(
                Rollout(
                    task,
                    [Turn([5, 6], [7 + sampling.seed % 9, 9], [-1.0, -1.0], [(version, 2)])],
                    1.0 if self.flat(task.key) else float(sampling.seed),
                    [],
                    version,
                    seed=sampling.seed,
                )
            )
            for task, sampling in zip(tasks, samplings, strict=True)
        ]

    def forget(self, num_rollouts: int) -> None:
        self.num_forgotten += num_rollouts

    def follow(self, outcomes: Any) -> None:
        self.followed.append(len(outcomes))


class Until(TrainerCallback):
    """Ends training after a step, as a request does; notes the log entries."""

    def __init__(self, step: int | None) -> None:
        self._step = step
        self.logs: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == self._step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(logs)


class Training:
    """A run in this process, from the newest checkpoint in its directory."""

    def __init__(
        self,
        policy: Path,
        directory: Path,
        until: int | None = None,
        overlap: dict | None = None,
        flat: Callable[[str], bool] = lambda key: False,
        seconds: float = 0.02,
        rollout: dict | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **trainer: Any,
    ) -> None:
        config = config_of(policy, **SMALL | trainer)
        config.env = {"e": EnvConfig("c", "x")}
        config.dataset = DatasetConfig(order="shuffle")
        config.overlap = OverlapConfig(**overlap or {})
        config.rollout = RolloutConfig(max_drift=1e9, **rollout or {})
        self.checkpoint = checkpoints.latest(directory / "checkpoints")
        step = checkpoints.step_of(self.checkpoint) if self.checkpoint else 0
        self.engine = Engine(step)
        self.players = Players(self.engine, flat, seconds)
        self.directory = directory
        writer = RolloutWriter(directory / "rollouts", config.env, step if self.checkpoint else None)
        tasks = {task.key: task for task in TASKS}
        rollouts = Rollouts(config, self.players, tasks, writer, self.engine)  # type: ignore[arg-type]
        self.trainer = PolicyTrainer(
            config,
            arguments.build(config, directory / "checkpoints"),
            load_model(config.model),
            load_tokenizer(config.model),
            Prepared(TASKS, {}, {}),
            rollouts,
            directory / "checkpoints",
        )
        # The tokens are made up, so the checks' rows are noted and not scored.
        self.checked: list[tuple[int, list[drift.Row]]] = []
        self.trainer._checks._check = self._note  # type: ignore[method-assign]
        self.trainer.sample_with_servers(self.engine, step)  # type: ignore[arg-type]
        self.stop = Until(until)
        for callback in queued_tasks.around([*callbacks, self.stop], self.trainer):
            self.trainer.add_callback(callback)

    def _note(self, trainer: Any, rows: list[drift.Row]) -> None:
        self.checked.append((trainer.state.global_step, rows))
        self.trainer._checks._is_due = not any(any(row.sampled) for row in rows)

    def train(self) -> Training:
        with contextlib.suppress(Stopped):
            self.trainer.train_from(self.checkpoint)
        self.trainer.save_now()
        return self

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_index(self.directory / "rollouts")

    def batches(self) -> list[list[str]]:
        """The tasks of each step's groups, in order, by the rollout files."""
        steps = sorted({row["file"] for row in self.rows if row["file"].startswith("step-")})
        rows = [[row for row in self.rows if row["file"] == step] for step in steps]
        return [[row["key"] for row in of_step[::GENERATIONS]] for of_step in rows]

    def ages(self) -> list[int]:
        return [
            int(row["file"][5:]) - 1 - row["weights_version"]
            for row in self.rows
            if row["file"].startswith("step-")
        ]

    @property
    def logs(self) -> list[dict[str, float]]:
        return [entry for entry in self.stop.logs if "loss" in entry]


def start_training(*args: Any, **options: Any) -> Training:
    return Training(*args, **options).train()


@pytest.fixture(scope="module")
def in_turn(policy, tmp_path_factory) -> Training:
    return start_training(policy, tmp_path_factory.mktemp("in_turn"))


def files_of(training: Training) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (training.directory / "rollouts").iterdir()}


def test_in_turn_the_queue_gives_the_trainer_what_it_gets_without_one_byte_for_byte(
    policy, tmp_path, in_turn
):
    """The two differ in the code that plays, so in nothing that is written, nor in the policy."""
    assert type(in_turn.trainer.batch_tasks) is FixedTasks, "without options the code is that of every run"
    queued = start_training(policy, tmp_path, rollout={"dynamic_sampling": True})
    assert type(queued.trainer.batch_tasks) is queued_tasks.QueuedTasks
    assert files_of(queued) == files_of(in_turn) and len(files_of(queued)) == 2 * STEPS + 2
    assert set(queued.ages()) == {0}
    left, right = (dict(t.trainer.model.named_parameters()) for t in (queued, in_turn))
    assert all(left[name].equal(right[name]) for name in left)
    # A batch that crosses the end of an epoch may have a task twice; its rollouts have seeds of their own.
    twice = [batch for batch in queued.batches() if len(set(batch)) < BATCH]
    seeds = [row["seed"] for row in queued.rows]
    assert twice and len(set(seeds)) == len(seeds)
    assert seeds[0] == seed_of(0, 0, queued.batches()[0][0], 0)


def test_in_exact_order_later_batches_are_played_ahead_and_train_the_tasks_that_they_do_in_turn(
    policy, tmp_path, in_turn
):
    ahead = start_training(policy, tmp_path, overlap=AHEAD)
    assert ahead.batches() == in_turn.batches()
    assert [row["seed"] for row in ahead.rows] == [row["seed"] for row in in_turn.rows]
    ages = ahead.ages()
    assert max(ages) == 2 and ages[: BATCH * GENERATIONS] == [0] * 6
    # Each step's last groups are started as soon as the engine has the weights before it.
    assert [version for _, version in ahead.players.started] == [0] * 9 + [1] * 3 + [2] * 3 + [3] * 3
    assert ahead.engine.num_tended >= STEPS, "also where the batch has landed already"
    assert ahead.players.num_in_flight == 0, "nothing is played beyond the last step"
    assert ahead.players.num_forgotten == STEPS * BATCH * GENERATIONS
    assert [entry["queue/filtered"] for entry in ahead.logs] == [0] * STEPS
    assert [entry["queue/finished"] + entry["queue/in_flight"] for entry in ahead.logs] == [
        6, 6, 6, 6, 3, 0,
    ]  # fmt: skip


def test_trl_logs_the_prompts_that_were_played(policy, tmp_path):
    ahead = start_training(policy, tmp_path, overlap=AHEAD)
    logged = list(ahead.trainer._logs["prompt"])
    played = [key for batch in ahead.batches() for key in batch for _ in range(GENERATIONS)]
    assert logged == played[-len(logged) :] and logged


def test_finished_groups_overtake_slow_ones_which_are_trained_within_the_bound(policy, tmp_path):
    overlap = {"max_staleness": 3, "lead": 1, "order": "finished"}
    ahead = start_training(policy, tmp_path, overlap=overlap, seconds=0.6, max_steps=12)
    assert 0 < max(ahead.ages()) <= 3
    trained = [key for batch in ahead.batches() for key in batch]
    assert Counter(trained) == Counter(key for key, _ in ahead.players.started)
    assert set(Counter(trained).values()) == {9}, "36 groups of 4 tasks"
    assert trained != [key for key, _ in ahead.players.started], "some were overtaken"
    assert any(entry["queue/out_of_order"] > 0 for entry in ahead.logs)
    for entry in ahead.logs:
        assert entry["idle/engine"] == 0.25
        assert 0 < entry["idle/trainer"] == entry["time/rollout"] / entry["time/step"] < 1
        parts = ("rollout", "sync", "logprobs", "update", "evaluation", "other")
        assert sum(entry[f"time/{part}"] for part in parts) == pytest.approx(entry["time/step"])


@pytest.mark.parametrize("order", ["exact", "finished"])
def test_a_run_that_is_resumed_twice_trains_each_task_once(policy, tmp_path, in_turn, order):
    overlap = AHEAD | {"order": order, "lead": 2 if order == "exact" else 1}
    for until in (2, 3, None):
        run = start_training(policy, tmp_path, until, overlap=overlap, seconds=0.2)
    if order == "exact":
        assert run.batches() == in_turn.batches()
    trained = Counter(key for batch in run.batches() for key in batch)
    assert trained == Counter(key for batch in in_turn.batches() for key in batch)
    assert run.players.started[0][1] == 3, "what was in flight is played again, with the resumed weights"


def test_a_step_that_was_interrupted_after_it_took_its_batch_takes_it_again(policy, tmp_path, in_turn):
    run = Training(policy, tmp_path, overlap=AHEAD)

    def interrupted(*_: Any, **__: Any) -> None:
        if run.trainer.state.global_step == 2:
            raise Stopped

    run.trainer._checks.check = interrupted  # type: ignore[method-assign]
    run.train()
    state = json.loads((tmp_path / "checkpoints" / "checkpoint-2" / "groups.json").read_text())
    assert state == {"low": 6, "above": []}
    assert start_training(policy, tmp_path, overlap=AHEAD).batches() == in_turn.batches()


def test_groups_of_equal_rewards_are_left_out_and_others_are_played_instead(policy, tmp_path):
    def flat(key: str) -> bool:
        return int(key[-1]) % 2 == 1

    for overlap in ({}, {"max_staleness": 2, "lead": 1}):
        name = tmp_path / f"{len(overlap)}"
        run = start_training(policy, name, overlap=overlap, flat=flat, rollout={"dynamic_sampling": True})
        assert [len(batch) for batch in run.batches()] == [BATCH] * STEPS
        assert not any(flat(key) for batch in run.batches() for key in batch)
        left_out = [row for row in run.rows if row["file"].startswith("filtered-")]
        assert left_out and all(flat(row["key"]) for row in left_out)
        filtered = [entry["queue/filtered"] for entry in run.logs]
        assert sum(filtered) == len(left_out) / GENERATIONS > STEPS
        flat_share = [entry["groups_without_variance"] for entry in run.logs]
        assert flat_share == pytest.approx([n / (n + BATCH) for n in filtered])
        assert [entry["e/rollouts"] for entry in run.logs] == [(n + BATCH) * 2 for n in filtered]
        assert run.players.followed == [(n + BATCH) * 2 for n in filtered]


def test_a_run_whose_groups_all_have_equal_rewards_ends_and_names_the_environment(policy, tmp_path):
    rollout = {"dynamic_sampling": True, "max_resampled": 4}
    run = Training(policy, tmp_path, flat=lambda key: True, rollout=rollout)
    with pytest.raises(RolloutError, match=r"left out 13 groups in a row.*\(1\).*max_resampled=4.*env\.e"):
        run.trainer.train_from(None)
    assert len(run.rows) == 13 * GENERATIONS, "its rollouts are kept"
    assert {row["file"] for row in run.rows} == {"filtered-000001"}


def test_groups_that_fail_end_a_run_with_their_cause_though_they_are_left_out(policy, tmp_path):
    run = Training(policy, tmp_path, rollout={"dynamic_sampling": True})

    def collect(tasks: Any, *_: Any) -> list[Any]:
        return [Failed(task, "engine", "gone", "logs/gateway.log") for task in tasks]

    run.players.collect = collect  # type: ignore[method-assign]
    with pytest.raises(RolloutError, match=r"engine in env\.e"):
        run.trainer.train_from(None)


def test_an_error_in_the_collectors_thread_is_raised_at_the_next_batch(policy, tmp_path):
    run = Training(policy, tmp_path, overlap=AHEAD)

    class Break(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                run.players.error = ServiceError("the gateway did not say")

    run.trainer.add_callback(Break())
    with pytest.raises(ServiceError, match="the gateway did not say"):
        run.trainer.train_from(None)
    assert run.trainer.state.global_step < STEPS


def test_a_fault_of_the_queue_in_the_collectors_thread_is_raised_as_well(policy, tmp_path):
    run = Training(policy, tmp_path, rollout={"dynamic_sampling": True})
    run.players.collect = lambda *_: [object()]  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(AttributeError, match="has no attribute 'rollout'"):
        run.trainer.train_from(None)


def test_a_rollout_beyond_the_bound_ends_the_run(policy, tmp_path):
    run = Training(policy, tmp_path, overlap={"max_staleness": 1})
    play = run.players._play
    run.players._play = lambda *args: play(*args[:3], 0)  # type: ignore[method-assign]
    with pytest.raises(ServiceError, match=r"weights of step 0.*of step 2 and overlap.max_staleness=1"):
        run.trainer.train_from(None)


def test_no_group_is_started_during_an_evaluation_which_has_the_weights_of_its_step(policy, tmp_path):
    class Evaluation(TrainerCallback):
        seen: list[tuple[int, int]] = []  # noqa: RUF012
        run: Training

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            with self.run.trainer.batch_tasks.holding():
                before = len(self.run.players.started)
                time.sleep(0.4)  # long enough for groups to land, and to be left out
                new = len(self.run.players.started) - before
                self.seen.append((self.run.engine.version - state.global_step, new))

    evaluation, rollout = Evaluation(), {"dynamic_sampling": True}
    run = evaluation.run = Training(
        policy,
        tmp_path,
        overlap=AHEAD,
        flat=lambda key: key[-1] == "1",
        seconds=0.4,
        rollout=rollout,
        callbacks=[evaluation],
    )
    run.train()
    assert evaluation.seen == [(0, 0)] * STEPS
    assert [len(batch) for batch in run.batches()] == [BATCH] * STEPS


def test_the_engine_samples_with_a_steps_weights_while_its_checkpoint_is_written(policy, tmp_path):
    class Saving(TrainerCallback):
        seen: list[bool] = []  # noqa: RUF012
        run: Training

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seen.append(state.global_step in {version for _, version in self.run.players.started})

    saving = Saving()
    run = saving.run = Training(
        policy, tmp_path, overlap=AHEAD, callbacks=[saving], save_strategy="steps", save_steps=1
    )
    run.train()
    assert saving.seen[:3] == [True] * 3, "the last three steps have nothing left to play"


def test_where_the_trainer_sets_the_pace_what_landed_for_later_batches_is_checked(policy, tmp_path):
    """With a rollout that takes no time, each batch but the first is older than the weights that train it."""
    overlap = {"max_staleness": 1, "lead": 1, "order": "exact"}
    run = start_training(policy, tmp_path, overlap=overlap, seconds=0.0, rollout={"drift_every": 2})
    assert [step for step, _ in run.checked] == [0, 2, 2, 4, 4], "the batch, and then what landed for later"
    has_current = [any(any(row.sampled) for row in rows) for _, rows in run.checked]
    assert has_current == [True, False, True, False, True]
    assert run.ages()[BATCH * GENERATIONS :] == [1] * (STEPS - 1) * BATCH * GENERATIONS


def test_the_engine_is_tended_while_the_trainer_waits(policy, tmp_path, monkeypatch):
    monkeypatch.setattr("gymexp.rollout.group_queue._MEANWHILE_S", 0.05)
    run = start_training(policy, tmp_path, overlap=AHEAD, seconds=1.0, max_steps=1)
    assert 3 <= run.engine.num_tended <= 20


def test_a_checkpoint_without_the_state_of_the_queue_is_named(policy, tmp_path):
    start_training(policy, tmp_path, 1, overlap=AHEAD)
    path = tmp_path / "checkpoints" / "checkpoint-1"
    (path / "groups.json").write_text('{"low": 3}')
    files = json.loads((path / "complete.json").read_text())
    assert files.pop("groups.json"), "the manifest has the state"
    (path / "complete.json").write_text(json.dumps(files))
    with pytest.raises(RunDirectoryError, match=r"groups.json must have the groups that are done"):
        start_training(policy, tmp_path, overlap=AHEAD)
