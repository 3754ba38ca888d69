"""How much of the training order a run plays: tasks a batch, steps, epochs. Known before it starts; pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from gymexp.config.grpo_arguments import value_of
from gymexp.config.schema import RunConfig
from gymexp.data.mix import share_out
from gymexp.errors import ConfigError
from gymexp.rollout.outcome import Task

_NO_LIMIT = 2**60
_COUNTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "generation_batch_size",
    "num_generations",
    "num_iterations",
)


@dataclass(frozen=True)
class Schedule:
    """Training runs through epochs without a gap: a batch that an epoch's end does not fill goes on with the
    next epoch's first tasks.

    num_tasks: of an epoch. batch_tasks: of a generation batch, over all ranks. steps_per_batch: optimizer
    steps that train on one generation batch; below 1 where a step trains on several. offset: where in the
    order the first batch would begin; not 0 only in a run that went on with another number of ranks.
    """

    num_tasks: int
    batch_tasks: int
    steps_per_batch: Fraction
    offset: int = 0

    def num_batches(self, steps: int) -> int:
        """Generation batches that so many steps begin."""
        return math.ceil(steps / self.steps_per_batch)

    def num_steps(self, epochs: float) -> int:
        """Whole steps after which each task was played as often as `epochs` says: the last batch is filled
        up with tasks of the epoch after."""
        wanted = Fraction(str(epochs)) * self.num_tasks - self.offset
        return math.ceil(math.ceil(wanted / self.batch_tasks) * self.steps_per_batch)

    def epoch(self, step: int) -> float:
        """Where training is after `step` steps."""
        return float((self.offset + step / self.steps_per_batch * self.batch_tasks) / self.num_tasks)

    def resumed_at(self, step: int, epoch: float) -> Schedule:
        """The same from a checkpoint on, which was written after `step` steps and at `epoch`."""
        offset = round(epoch * self.num_tasks - step / self.steps_per_batch * self.batch_tasks)
        return Schedule(self.num_tasks, self.batch_tasks, self.steps_per_batch, offset)


def schedule_of(trainer: Mapping[str, Any], num_ranks: int, num_tasks: int) -> Schedule:
    """Of `trainer.*`, as GRPOConfig counts."""
    rollouts = value_of(trainer, "generation_batch_size")
    per_step = value_of(trainer, "per_device_train_batch_size") * num_ranks
    accumulated = value_of(trainer, "gradient_accumulation_steps")
    if rollouts is None:
        rollouts = per_step * (value_of(trainer, "steps_per_generation") or accumulated)
    return Schedule(
        num_tasks,
        rollouts // value_of(trainer, "num_generations"),
        Fraction(rollouts * value_of(trainer, "num_iterations"), per_step * accumulated),
    )


def check(config: RunConfig, num_ranks: int, num_tasks: int | None = None) -> Schedule:
    """Raises ConfigError where training would come to nothing: the training set has fewer tasks than one
    generation batch takes, or there is no step.

    num_ranks: training processes; where they are not known yet, 1 lets pass what more may refuse. num_tasks:
    of the training set; None before it is made, where the configuration says how many it can have at most.
    """
    for key in _COUNTS:
        value = config.trainer.get(key)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ConfigError(f"trainer.{key} must be a whole number >= 1, got {value!r}")
    if config.trainer.get("ignore_data_skip"):
        raise ConfigError(
            "trainer.ignore_data_skip must be false, so that a resumed run goes on with the tasks after its "
            f"checkpoint's, got {config.trainer['ignore_data_skip']!r}"
        )
    epochs = value_of(config.trainer, "num_train_epochs")
    if value_of(config.trainer, "max_steps") < 0 and not 0 < epochs < math.inf:
        raise ConfigError(
            "trainer.num_train_epochs must be a number > 0 where trainer.max_steps is not set, got "
            f"{epochs!r}"
        )
    most = _most_tasks(config) if num_tasks is None else num_tasks
    schedule = schedule_of(config.trainer, num_ranks, most)
    if schedule.batch_tasks <= most:
        return schedule
    ranks = "" if num_ranks == 1 else f" on {num_ranks} training processes"
    needs = (
        f"at least {schedule.batch_tasks}, the tasks of one batch of rollouts{ranks} (trainer."
        "per_device_train_batch_size x trainer.gradient_accumulation_steps or steps_per_generation, "
        "/ trainer.num_generations)"
    )
    if config.dataset.train_size is not None:
        problem = f"dataset.train_size must be {needs}, got {most}: raise it"
    else:
        problem = (
            f"the training set must have {needs}, got {most}: give the environments more tasks "
            "(env.<name>.data.train_size), or let tasks come several times an epoch (dataset.train_size="
            f"{schedule.batch_tasks})"
        )
    raise ConfigError(f"{problem}, or make the batch smaller; with fewer nothing would be trained")


def _most_tasks(config: RunConfig) -> int:
    """An upper limit of the training set's tasks, as far as the configuration says one."""
    if config.dataset.train_size is not None:
        return config.dataset.train_size
    available = {name: env.data.train_size or _NO_LIMIT for name, env in config.env.items()}
    counts = share_out(available, {name: env.weight for name, env in config.env.items()}, None)
    return sum(counts.values())


def plan(config: RunConfig, num_ranks: int, mixed: Sequence[Task]) -> dict[str, Any]:
    """What `data/mix.json` says of the training to come. Raises ConfigError as `check` does.

    tasks: played in all, counted as often as they come. played: different ones, by environment.
    """
    schedule = check(config, num_ranks, len(mixed))
    max_steps = value_of(config.trainer, "max_steps")
    epochs = value_of(config.trainer, "num_train_epochs")
    steps = max_steps if max_steps >= 0 else schedule.num_steps(epochs)
    tasks = schedule.num_batches(steps) * schedule.batch_tasks
    played = Counter({task.key: task.env for task in mixed[:tasks]}.values())
    return {
        "processes": num_ranks,
        "tasks_per_batch": schedule.batch_tasks,
        "steps": steps,
        "tasks": tasks,
        "epochs": tasks / schedule.num_tasks,
        "played": {env: played[env] for env in config.env},
    }


def told(planned: Mapping[str, Any], num_tasks: int) -> str:
    """The same in a line."""
    steps, tasks, epochs = (planned[key] for key in ("steps", "tasks", "epochs"))
    return f"training: {steps} steps play {tasks} tasks: {epochs:.2f} epochs of {num_tasks}"
