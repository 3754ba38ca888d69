"""Which tasks the real trainer plays, over more than two epochs and however often it is resumed.

A random model of one layer; rollouts are made up and fall to the same tokens for the same tasks and step.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from trl.trainer.utils import RepeatSampler
from whole_run import TINY

from gymexp.config.schema import DatasetConfig, EnvConfig, ModelConfig, RunConfig
from gymexp.data.mix import epoch_order
from gymexp.data.prepare import Prepared
from gymexp.engine.weight_sync import WeightSync
from gymexp.errors import ConfigError, RunDirectoryError
from gymexp.policy.model import load_tokenizer
from gymexp.rollout.outcome import Task
from gymexp.training import arguments, checkpoints
from gymexp.training.batches import TaskSampler, load_generation, save_generation
from gymexp.training.engine_client import ServerSampling
from gymexp.training.schedule import Schedule
from gymexp.training.trainer import PolicyTrainer

GENERATIONS = 2
TOKENIZER = load_tokenizer(ModelConfig("tiny", str(TINY)))
SMALL: dict[str, Any] = {
    "num_generations": GENERATIONS,
    "per_device_train_batch_size": 4,  # two tasks
    "learning_rate": 1e-4,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}
TASKS = [Task(f"{env}/train/{n:06d}", env, "x", {}) for n in range(3) for env in ("a", "b")] + [
    Task("a/train/000003", "a", "x", {})
]


def batched(some: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(some[i : i + size]) for i in range(0, len(some), size))


class MadeUp:
    """Rollouts of random tokens; remembers which tasks it was asked for in each step."""

    seconds = 0.0

    def __init__(self) -> None:
        self.collected: list[tuple[int, list[str]]] = []

    def __call__(self, prompts: list[str], trainer: PolicyTrainer) -> dict[str, list[Any]]:
        step = trainer.state.global_step
        assert all(len(set(group)) == 1 for group in batched(prompts, GENERATIONS)), "groups are whole"
        self.collected.append((step, prompts[::GENERATIONS]))
        draw = random.Random(f"{step} {prompts}")
        prompt_ids = [[draw.randrange(5, 200) for _ in range(draw.randrange(2, 5))] for _ in prompts]
        completion_ids = [[draw.randrange(5, 200) for _ in range(draw.randrange(2, 7))] for _ in prompts]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "logprobs": [[-1.0] * len(row) for row in completion_ids],
            "env_mask": [[1] * len(row) for row in completion_ids],
            "reward": [draw.random() for _ in prompts],
        }

    def write_trained(self, batch: Any, trainer: PolicyTrainer) -> None: ...


class StopAfter(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self._step = step
        self.epochs: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.epochs.append(state.epoch)
        if state.global_step == self._step:
            control.should_training_stop = True


def train(directory: Path, until: int | None = None, tasks: list[Task] = TASKS, **trainer: Any) -> Any:
    """From the newest checkpoint in `directory` to the end, or up to step `until`. Returns the trainer; its
    `collected` has what was played in each collection, `epochs` the epoch after each step."""
    config = RunConfig(
        model=ModelConfig("random", str(TINY), dtype="float32"),
        env={name: EnvConfig("c", "x") for name in ("a", "b")},
        trainer=SMALL | trainer,
    )
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY, **shape), dtype=torch.float32)
    rollouts = MadeUp()
    args = arguments.build(config, directory)
    made = PolicyTrainer(
        config,
        args,
        model,
        TOKENIZER,
        Prepared(tasks, {}, {}),
        rollouts,  # type: ignore[arg-type]
        directory,
    )
    stop = StopAfter(until)
    made.add_callback(stop)
    made.train_from(checkpoints.latest(directory))
    made.save_now()
    made.collected, made.epochs = rollouts.collected, stop.epochs
    return made


def played(*trainers: Any) -> list[str]:
    return [key for trainer in trainers for _, keys in trainer.collected for key in keys]


def test_every_epoch_has_each_task_once_in_another_order_and_no_gap_between(tmp_path):
    order = played(train(tmp_path, max_steps=14))  # 28 tasks: four epochs of seven
    epochs = list(batched(order, len(TASKS)))
    assert epochs[0] == tuple(task.key for task in TASKS)
    assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
    assert len(set(epochs)) == 4
    assert all(abs(Counter(key[0] for key in pair)["a"] - 8 / 7) < 1 for pair in batched(order, 2))


@pytest.mark.grid
@pytest.mark.parametrize("stops", [(1, 11), (4, 9)])
def test_a_run_that_is_resumed_plays_what_the_undisturbed_one_plays(tmp_path, stops):
    whole = train(tmp_path / "whole", max_steps=14)
    parts = [train(tmp_path / "parts", until=stop, max_steps=14) for stop in (*stops, None)]
    assert [one for part in parts for one in part.collected] == whole.collected
    assert [epoch for part in parts for epoch in part.epochs] == whole.epochs
    same_weights(parts[-1], whole)


def same_weights(one: Any, other: Any) -> None:
    for left, right in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.grid
@pytest.mark.parametrize(
    "trainer",
    [
        {"steps_per_generation": 3},  # of three optimizer steps
        {"num_iterations": 2},
        {"steps_per_generation": 3, "gradient_accumulation_steps": 2},  # a step and a half
        {"steps_per_generation": 1, "gradient_accumulation_steps": 3},  # three of a step
    ],
)
def test_a_run_that_stops_in_the_middle_of_a_generation_goes_on_in_it(tmp_path, trainer):
    whole = train(tmp_path / "whole", max_steps=8, **trainer)
    parts = [train(tmp_path / "parts", until=stop, max_steps=8, **trainer) for stop in (2, 5, None)]
    assert [one for part in parts for one in part.collected] == whole.collected
    same_weights(parts[-1], whole)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(1, 4), (2, 7), (2.5, 9), (3, 11)],  # 7 tasks an epoch, two a step: the last batch is filled up
)
def test_without_max_steps_every_task_is_played_as_often_as_num_train_epochs_says(tmp_path, epochs, steps):
    trainer = train(tmp_path, num_train_epochs=epochs)
    assert trainer.state.global_step == trainer.state.max_steps == steps
    times = Counter(played(trainer))
    assert min(times.values()) >= int(epochs) and sum(times.values()) == 2 * steps


def test_the_epoch_that_trackers_show_counts_tasks(tmp_path):
    trainer = train(tmp_path, max_steps=9, steps_per_generation=3)
    assert trainer.epochs == pytest.approx([step * 2 / 7 for step in range(1, 10)])


def test_a_checkpoint_an_epoch_comes_with_the_step_that_ends_it(tmp_path):
    train(tmp_path, max_steps=9, save_strategy="epoch")
    saved = sorted(checkpoints.step_of(path) for path in tmp_path.glob("checkpoint-*"))
    assert saved == [4, 7, 9]


def sampler(ranks: int, offset: int = 0, generations: int = 2, **trainer: Any) -> TaskSampler:
    args: Any = SimpleNamespace(
        **{"max_steps": 9, "num_generations": generations, "steps_per_generation": 2, "num_iterations": 1}
        | trainer
    )
    uses = Fraction(args.steps_per_generation * args.num_iterations, 2)
    schedule = Schedule(len(TASKS), 2 * ranks, uses, offset)
    return TaskSampler(TASKS, DatasetConfig(), schedule, args)


def test_the_first_epoch_is_what_trls_own_sampler_gives():
    trls = RepeatSampler(TASKS, mini_repeat_count=3, batch_size=2, repeat_count=4, shuffle=False)
    ours = list(sampler(1, generations=3, num_iterations=2))
    assert ours[: len(trls)] == list(trls)


def test_the_sampler_is_as_long_as_it_says():
    for trainer in ({}, {"num_iterations": 3}, {"steps_per_generation": 1}, {"max_steps": 0}):
        assert len(sampler(1, **trainer)) == len(list(sampler(1, **trainer)))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_order_of_tasks_does_not_depend_on_the_number_of_ranks(ranks):
    """Each rank's part of a generation batch as accelerate deals it out, put together again."""
    a_rank = BatchSampler(sampler(ranks), batch_size=2 * GENERATIONS, drop_last=False)
    parts = [list(BatchSamplerShard(a_rank, ranks, rank)) for rank in range(ranks)]
    dealt = [[index for part in batch for index in part] for batch in zip(*parts, strict=True)]
    order = [index for batch in dealt[::2] for index in batch[::GENERATIONS]]  # each is trained on twice
    assert dealt[::2] == dealt[1::2]
    epochs = list(batched(order, len(TASKS)))
    assert epochs[0] == tuple(range(len(TASKS))) and len(order) == 18 * ranks
    for number, epoch in enumerate(epochs):
        assert list(epoch) == epoch_order(TASKS, number, "interleave", 0)[: len(epoch)]


def test_a_run_that_goes_on_with_other_ranks_goes_on_in_the_order():
    one: Any = SimpleNamespace(max_steps=9, num_generations=1, steps_per_generation=1, num_iterations=1)
    on_two, step = Schedule(len(TASKS), 4, Fraction(1)), 5
    on_one = Schedule(len(TASKS), 2, Fraction(1)).resumed_at(step, on_two.epoch(step))
    before = list(TaskSampler(TASKS, DatasetConfig(), on_two, one))[: 4 * step]
    after = list(TaskSampler(TASKS, DatasetConfig(), on_one, one))[2 * step :]  # transformers skips so many
    assert before + after == [i for n in range(4) for i in epoch_order(TASKS, n, "interleave", 0)]


def test_a_generation_is_not_given_to_fewer_ranks_than_it_was_made_for(tmp_path):
    for rank in range(2):
        save_generation(tmp_path, rank, [{"advantages": torch.tensor([float(rank)]), "none": None}])
    device = torch.device("cpu")
    assert load_generation(tmp_path, 1, 2, device)[0]["advantages"].item() == 1.0
    with pytest.raises(
        RunDirectoryError, match=r"each of 2 training processes has a part, got 1: resume with"
    ):
        load_generation(tmp_path, 0, 1, device)


def test_fewer_tasks_than_a_batch_are_refused_by_the_trainer_as_well(tmp_path):
    with pytest.raises(ConfigError, match=r"at least 4 tasks, .* on 1 training processes, got 3"):
        train(tmp_path, tasks=TASKS[:3], gradient_accumulation_steps=2)


class Asleep(WeightSync):
    """vLLM on the trainer's GPU: awake between `update` and `sleep`."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.awake = False

    def update(self, version: int, specs: Any, weights: Any) -> None:
        assert dict(weights)
        self.versions.append(version)
        self.awake = True

    def sleep(self) -> None:
        self.awake = False


def test_a_shared_engine_is_awake_with_the_steps_weights_in_every_collection_of_a_step(tmp_path, monkeypatch):
    sync = Asleep()
    engine = ServerSampling(sync, shared=True)
    play = MadeUp.__call__

    def awake(self: MadeUp, prompts: list[str], trainer: PolicyTrainer) -> Any:
        with engine.sampling(trainer.state.global_step):
            assert sync.awake and sync.versions[-1] == trainer.state.global_step
            return play(self, prompts, trainer)

    monkeypatch.setattr(MadeUp, "__call__", awake)
    go_on = PolicyTrainer.train_from

    def with_servers(self: PolicyTrainer, checkpoint: Path | None) -> None:
        self.sample_with_servers(engine, 0)
        go_on(self, checkpoint)

    monkeypatch.setattr(PolicyTrainer, "train_from", with_servers)
    train(tmp_path, max_steps=2, gradient_accumulation_steps=3, steps_per_generation=1)
    assert sync.versions == [0, 0, 0, 1, 1, 1]
