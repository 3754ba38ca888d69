"""The order in which the trainer reads its tasks: the sampler, the count of epochs, and the part of a
checkpoint that holds a generation batch on which later steps still train."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback

from gymexp.config.schema import DatasetConfig
from gymexp.data.mix import epoch_order
from gymexp.errors import ConfigError, RunDirectoryError
from gymexp.rollout.outcome import Task
from gymexp.training.schedule import Schedule

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig


def build_schedule(args: GRPOConfig, num_tasks: int) -> Schedule:
    """Builds the schedule of a run from TRL's arguments, which know the number of training processes.

    Raises ConfigError if one batch of rollouts takes more than `num_tasks` tasks. `schedule.check` finds this
    before the run, but only for the number of processes that is known at that time.
    """
    assert args.generation_batch_size and args.steps_per_generation and args.num_generations
    batch_tasks = args.generation_batch_size // args.num_generations
    if batch_tasks > num_tasks:
        raise ConfigError(
            f"the training set must have at least {batch_tasks} tasks, those of one batch of rollouts on "
            f"{args.world_size} training processes, got {num_tasks}: make the batch smaller"
        )
    uses = args.steps_per_generation * args.num_iterations
    return Schedule(num_tasks, batch_tasks, Fraction(uses, args.gradient_accumulation_steps))


class TaskOrder:
    """The order of the tasks, epoch after epoch without end: a position's index in `tasks`."""

    def __init__(self, tasks: Sequence[Task], dataset: DatasetConfig) -> None:
        """tasks: in the order of the first epoch."""
        self._num_tasks = len(tasks)
        # A batch has no more tasks than an epoch, so its tasks come from two epochs at most.
        order = partial(epoch_order, tasks, order=dataset.order, seed=dataset.seed)
        self._epoch = lru_cache(maxsize=4)(order)

    def __call__(self, position: int) -> int:
        epoch, index = divmod(position, self._num_tasks)
        return self._epoch(epoch)[index]


class TaskSampler(Sampler[int]):
    """Yields the indices of `tasks` for the whole training.

    transformers sees one epoch, and on resume it skips to the right place in that epoch. If transformers
    counted the epochs itself, each would drop the tasks at its end that do not fill a batch.

    The sampler repeats a generation batch as TRL's RepeatSampler does: each task `num_generations` times in a
    row, and the whole batch once for every micro-batch that trains on it. Every rank reads the same indices
    and takes its part of each batch.
    """

    def __init__(
        self, tasks: Sequence[Task], dataset: DatasetConfig, schedule: Schedule, args: GRPOConfig
    ) -> None:
        """tasks: in the order of the first epoch. args: TRL's arguments, with `max_steps` set."""
        assert args.steps_per_generation and args.num_generations
        self._schedule = schedule
        self._num_batches = max(1, schedule.num_batches(args.max_steps))
        self._num_generations = args.num_generations
        self._repeats = args.steps_per_generation * args.num_iterations
        self._order = TaskOrder(tasks, dataset)

    def __iter__(self) -> Iterator[int]:
        count = self._schedule.batch_tasks
        for number in range(self._num_batches):
            first = self._schedule.offset + number * count
            batch = [self._at(position) for position in range(first, first + count)]
            for _ in range(self._repeats):
                for index in batch:
                    yield from [index] * self._num_generations

    def __len__(self) -> int:
        return self._num_batches * self._schedule.batch_tasks * self._num_generations * self._repeats

    def _at(self, position: int) -> int:
        return self._order(position)


class PlaceSampler(TaskSampler):
    """Yields places of a batch (0, 1, …) instead of tasks, for a run whose tasks are known only when it plays
    them (`gymexp.training.drawn_tasks`, `gymexp.training.queued_tasks`)."""

    def _at(self, position: int) -> int:
        return (position - self._schedule.offset) % self._schedule.batch_tasks


class Epochs(TrainerCallback):
    """Counts epochs by tasks played, because transformers sees one epoch only. Requests a log entry and a
    checkpoint at the end of each epoch if `logging_strategy` and `save_strategy` are "epoch"."""

    def __init__(self, schedule: Callable[[], Schedule]) -> None:
        self._schedule = schedule

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        schedule = self._schedule()
        state.epoch = schedule.epoch(state.global_step)
        ended = int(state.epoch) > int(schedule.epoch(state.global_step - 1))
        if (
            ended and state.global_step < state.max_steps
        ):  # At the last step transformers logs and saves itself.
            control.should_save |= args.save_strategy == "epoch"
            control.should_log |= args.logging_strategy == "epoch"


def read_epoch(checkpoint: Path) -> float:
    """Returns the epoch, with its fraction, that a checkpoint's trainer_state.json names."""
    return json.loads((checkpoint / "trainer_state.json").read_text())["epoch"]


def save_generation(checkpoint: Path, rank: int, buffered: Any) -> None:
    """Writes this rank's part of a generation batch on which later steps still train to
    `generation-<rank>.pt`."""
    torch.save(buffered, checkpoint / f"generation-{rank}.pt")


def resume_generation(trainer: Any, checkpoint: Path, step: int) -> None:
    """Puts TRL's trainer into the state that it had after `step` steps: its count of micro-batches, which
    decides when it generates, and the generation batch that it trains on until then."""
    args = trainer.args
    trainer._step = step * args.gradient_accumulation_steps
    trainer._buffered_inputs = load_generation(
        checkpoint, args.process_index, args.world_size, trainer.accelerator.device
    )


def load_generation(checkpoint: Path, rank: int, num_ranks: int, device: torch.device) -> Any:
    """Returns what `save_generation` wrote for this rank; None if the checkpoint ends a generation batch.

    Raises RunDirectoryError if the checkpoint was written by another number of ranks.
    """
    parts = list(checkpoint.glob("generation-*.pt"))
    if not parts:
        return None
    if len(parts) != num_ranks:
        raise RunDirectoryError(
            f"{checkpoint} lies in the middle of a generation, of which each of {len(parts)} training "
            f"processes has a part, got {num_ranks}: resume with as many GPUs, or remove this checkpoint to "
            "go on from the one before it"
        )
    return torch.load(checkpoint / f"generation-{rank}.pt", map_location=device, weights_only=True)
