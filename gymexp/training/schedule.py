"""How much of the training order a run plays: tasks per batch, steps, epochs. Pure, computed before a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from gymexp.config.grpo_arguments import value_of
from gymexp.config.schema import RunConfig
from gymexp.data.curriculum import count_tasks, draws_tasks
from gymexp.data.mix import share_out
from gymexp.data.weights import Weights
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
    """How training goes through the order of tasks. Epochs follow each other without a gap: a batch at the
    end of an epoch is filled up with the first tasks of the next one.

    num_tasks: tasks of an epoch. batch_tasks: tasks of a generation batch, over all ranks. steps_per_batch:
    optimizer steps that train on one generation batch; below 1 if a step trains on several. offset: the index
    in the order at which batch 0 would begin; 0 unless the run was resumed with another number of ranks.
    """

    num_tasks: int
    batch_tasks: int
    steps_per_batch: Fraction
    offset: int = 0

    def num_batches(self, steps: int) -> int:
        """Returns the number of generation batches that `steps` steps use, wholly or in part."""
        return math.ceil(steps / self.steps_per_batch)

    def num_steps(self, epochs: float) -> int:
        """Returns the number of whole steps after which `epochs` epochs are played. The last batch is filled
        up with tasks of the next epoch."""
        tasks = Fraction(str(epochs)) * self.num_tasks - self.offset
        return math.ceil(math.ceil(tasks / self.batch_tasks) * self.steps_per_batch)

    def epoch(self, step: int) -> float:
        """Returns the epoch, with its fraction, after `step` steps."""
        return float((self.offset + step / self.steps_per_batch * self.batch_tasks) / self.num_tasks)

    def resumed_at(self, step: int, epoch: float) -> Schedule:
        """Returns the schedule for resuming from a checkpoint that was written after `step` steps, at
        `epoch`."""
        offset = round(epoch * self.num_tasks - step / self.steps_per_batch * self.batch_tasks)
        return Schedule(self.num_tasks, self.batch_tasks, self.steps_per_batch, offset)


def schedule_of(trainer: Mapping[str, Any], num_ranks: int, num_tasks: int) -> Schedule:
    """Returns the schedule of `trainer.*`, as GRPOConfig computes it. num_ranks: training processes."""
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
    """Returns the schedule of a run. Raises ConfigError if the run would train nothing, because the training
    set has fewer tasks than one generation batch, or because there is no step.

    num_ranks: training processes; 1 if they are not known yet, which may accept what more processes refuse.
    num_tasks: tasks of the training set; None before the set is made, when the configuration's upper limit
    counts.
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
    max_tasks = _max_tasks(config) if num_tasks is None else num_tasks
    schedule = schedule_of(config.trainer, num_ranks, max_tasks)
    _check_steps(config, schedule, num_ranks)
    if schedule.batch_tasks <= max_tasks:
        return schedule
    ranks = "" if num_ranks == 1 else f" on {num_ranks} training processes"
    needs = (
        f"at least {schedule.batch_tasks}, the tasks of one batch of rollouts{ranks} (trainer."
        "per_device_train_batch_size x trainer.gradient_accumulation_steps or steps_per_generation, "
        "/ trainer.num_generations)"
    )
    if config.dataset.train_size is not None:
        problem = f"dataset.train_size must be {needs}, got {max_tasks}: raise it"
    else:
        problem = (
            f"the training set must have {needs}, got {max_tasks}: give the environments more tasks "
            "(env.<name>.data.train_size), or let tasks come several times an epoch (dataset.train_size="
            f"{schedule.batch_tasks})"
        )
    raise ConfigError(f"{problem}, or make the batch smaller; with fewer nothing would be trained")


def _check_steps(config: RunConfig, schedule: Schedule, num_ranks: int) -> None:
    """Refuses a queue of groups for a batch that is not one optimizer step, where the steps since a rollout
    was sampled would not count the batches, and a step would train on what its own updates made stale."""
    overlap = config.overlap.max_staleness
    if schedule.steps_per_batch == 1 or not (overlap or config.rollout.dynamic_sampling):
        return
    key = f"overlap.max_staleness={overlap}" if overlap else "rollout.dynamic_sampling=true"
    ranks = "" if num_ranks == 1 else f" on {num_ranks} training processes"
    raise ConfigError(
        f"with {key} a batch of rollouts must be one optimizer step, got {schedule.steps_per_batch} steps a "
        f"batch{ranks}: leave out trainer.num_iterations, trainer.steps_per_generation and "
        "trainer.generation_batch_size"
    )


def _max_tasks(config: RunConfig) -> int:
    """Returns the most tasks that the training set can have by the configuration; a huge number if the
    configuration sets no limit."""
    if config.dataset.train_size is not None:
        return config.dataset.train_size
    available = {name: env.data.train_size or _NO_LIMIT for name, env in config.env.items()}
    if draws_tasks(config.dataset):
        return sum(available[name] for name in Weights.of(config).ever())
    counts = share_out(available, {name: env.weight for name, env in config.env.items()}, None)
    return sum(counts.values())


def plan(config: RunConfig, num_ranks: int, mixed: Sequence[Task]) -> dict[str, Any]:
    """Returns the entry `training` of `data/mix.json`, which describes the training before it starts.

    Its `tasks` is the number of tasks played in total, with repetitions; its `played` the number of different
    tasks played, by environment. If a curriculum draws the tasks, `drawn` has the tasks by environment with
    repetitions. mixed: the first epoch's tasks, in order. Raises ConfigError if the run
    would train nothing.
    """
    schedule = check(config, num_ranks, len(mixed))
    max_steps = value_of(config.trainer, "max_steps")
    epochs = value_of(config.trainer, "num_train_epochs")
    steps = max_steps if max_steps >= 0 else schedule.num_steps(epochs)
    tasks = schedule.num_batches(steps) * schedule.batch_tasks
    drawn = _drawn(config, schedule, steps) if draws_tasks(config.dataset) else None
    if drawn is None:
        played = Counter({task.key: task.env for task in mixed[:tasks]}.values())
    else:
        available = Counter(task.env for task in mixed)
        # A task comes again only once each of its environment has come.
        played = {env: min(count, available[env]) for env, count in drawn.items()}
    return {
        "processes": num_ranks,
        "tasks_per_batch": schedule.batch_tasks,
        "steps": steps,
        "tasks": tasks,
        "epochs": tasks / schedule.num_tasks,
        "played": {env: played[env] for env in config.env},
    } | ({} if drawn is None else {"drawn": drawn})


def _drawn(config: RunConfig, schedule: Schedule, steps: int) -> dict[str, int]:
    """Returns how many tasks of each environment a curriculum draws in `steps` steps, with repetitions."""
    before = [math.floor(n * schedule.steps_per_batch) for n in range(schedule.num_batches(steps))]
    weights = Weights.of(config)
    counts = count_tasks(weights, weights.ever(), before, schedule.batch_tasks)
    return {env: counts[env] for env in config.env}


def describe(training_plan: Mapping[str, Any], num_tasks: int) -> str:
    """Returns the result of `plan` as one line of text. num_tasks: tasks of an epoch."""
    steps, tasks, epochs = (training_plan[key] for key in ("steps", "tasks", "epochs"))
    return f"training: {steps} steps play {tasks} tasks: {epochs:.2f} epochs of {num_tasks}"


def remarks(
    config: RunConfig, training_plan: Mapping[str, Any], mixed: Sequence[Task], allowed: Mapping[str, int]
) -> list[str]:
    """Returns a line for each environment whose limit keeps the engine from the batches that `overlap.lead`
    plays ahead. mixed: the first epoch's tasks. allowed: the rollouts in flight of each environment."""
    overlap = config.overlap
    if not overlap.max_staleness:
        return []
    num_generations = value_of(config.trainer, "num_generations")
    wanted = (overlap.lead + 1) * training_plan["tasks_per_batch"] * num_generations
    counts = Counter(task.env for task in mixed)
    lines = []
    for env, count in counts.items():
        of_env = math.ceil(wanted * count / len(mixed))
        if allowed[env] < of_env:
            lines.append(
                f"env.{env} has at most {allowed[env]} rollouts in flight, where overlap.lead={overlap.lead} "
                f"plays about {of_env} of it at once: env.{env}.max_concurrency={of_env} lets them"
            )
    return lines
