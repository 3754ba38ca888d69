"""The tasks of each batch where a queue of groups decides them: groups are played ahead of training, or in
place of groups of equal rewards. The first rank has the queue, and takes the batches for all ranks.

The groups' serials are places in the order of tasks that a run without a queue has. A checkpoint has the
serials that are done; a resumed run plays the others, in order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from gymexp.config.schema import RunConfig
from gymexp.data.curriculum import draws_tasks
from gymexp.errors import RunDirectoryError
from gymexp.rollout.ahead import Landed
from gymexp.rollout.group_queue import GroupQueue
from gymexp.rollout.group_schedule import GroupSchedule
from gymexp.rollout.outcome import Outcome, Task
from gymexp.rollout.play import Distribution
from gymexp.training import checkpoints
from gymexp.training.batches import PlaceSampler, TaskOrder
from gymexp.training.drawn_tasks import DrawnTasks, FixedTasks
from gymexp.training.ranks import on_main_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gymexp.training.rollout_func import Rollouts
    from gymexp.training.trainer import PolicyTrainer


_FILE = "groups.json"


class QueuedTasks(FixedTasks):
    """Takes batches from a queue of groups."""

    sampler = PlaceSampler

    def __init__(
        self, config: RunConfig, tasks: Sequence[Task], batch_tasks: int, rollouts: Rollouts
    ) -> None:
        """tasks: in the order of the first epoch. batch_tasks: of a batch, over all ranks."""
        self._config = config
        self._tasks = tasks
        self._order = TaskOrder(tasks, config.dataset)
        self._batch_tasks = batch_tasks
        self._rollouts = rollouts
        self._queue: GroupQueue | None = None  # only on the first rank, and only during training
        self.prompts = [str(place) for place in range(batch_tasks)]  # they stand for tasks until `fill`

    @property
    def is_ahead(self) -> bool:
        """Whether groups are played during training."""
        return self._config.overlap.max_staleness > 0

    def begin(self, trainer: PolicyTrainer, checkpoint: Path | None) -> None:
        if not trainer.accelerator.is_main_process:
            return
        overlap = self._config.overlap
        groups = GroupSchedule(
            self._batch_tasks,
            min(overlap.lead, overlap.max_staleness),
            overlap.max_staleness,
            overlap.order,  # pyright: ignore[reportArgumentType]
            num_batches=trainer.args.max_steps,
        )
        if checkpoint:
            groups.restore(_read(checkpoint), checkpoints.step_of(checkpoint))
        self._num_generations = trainer.grpo.num_generations or 1
        self._distribution = Distribution(temperature=trainer.grpo.temperature)
        self._queue = GroupQueue(
            groups, self._batch_tasks, self._config.rollout, self._play, self._rollouts.forget
        )

    def fill(self, inputs: Any, trainer: PolicyTrainer) -> Any:
        step = trainer.state.global_step
        if trainer.use_vllm and step != trainer._last_loaded_step:  # else TRL would do so after the rollouts
            trainer.sync_weights()
            trainer._last_loaded_step = step
        began = time.monotonic()
        keys = on_main_rank(trainer.accelerator, lambda: self._take(step))
        self._rollouts.waited = time.monotonic() - began
        return [dict(row) | {"prompt": keys[int(row["prompt"])]} for row in inputs]

    def _take(self, step: int) -> list[str]:
        assert self._queue is not None
        return self._rollouts.take(self._queue, step)

    def play_ahead(self, trainer: PolicyTrainer) -> None:
        """Starts the groups that are sampled with the weights that the engine has just got."""
        if self._queue is not None:
            self._queue.advance(trainer.state.global_step)

    def landed(self, step: int) -> list[Outcome]:
        return [] if self._queue is None else self._rollouts.landed(self._queue, step)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Starts no group within the block."""
        if self._queue is None:
            yield
            return
        self._queue.hold()
        try:
            yield
        finally:
            self._queue.release()

    def save(self, checkpoint: Path, trainer: PolicyTrainer) -> None:
        if self._queue is not None:
            state = self._queue.state(trainer.state.global_step)
            (checkpoint / _FILE).write_text(json.dumps(state))

    def _play(self, serial: int, landed: Landed) -> None:
        """Begins to play a group. Its seeds are those that it has in a run without a queue."""
        key, batch = self._key(serial), serial // self._batch_tasks
        earlier = sum(self._key(one) == key for one in range(batch * self._batch_tasks, serial))
        first = earlier * self._num_generations
        indices = range(first, first + self._num_generations)
        self._rollouts.start(key, batch, indices, self._distribution, landed)

    def _key(self, serial: int) -> str:
        return self._tasks[self._order(serial)].key


def _read(checkpoint: Path) -> dict[str, Any]:
    """Returns the state of the queue in a checkpoint. Raises RunDirectoryError if it has none."""
    path = checkpoint / _FILE
    try:
        state = json.loads(path.read_text())
        above = [[int(first), int(length)] for first, length in state["above"]]
        return {"low": int(state["low"]), "above": above}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(
            f"{path} must have the groups that are done, as a run with overlap.max_staleness or "
            f"rollout.dynamic_sampling writes it: {type(error).__name__}: {error}"
        ) from None


class _SendFirst(TrainerCallback):
    """Sends the engine a step's weights as soon as the step is done, so that it samples with them during an
    evaluation and a checkpoint."""

    def __init__(self, trainer: PolicyTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.sync_weights()


class _PlayAhead(TrainerCallback):
    """Starts the groups of later batches at the end of a step, after its evaluation, unless training ends."""

    def __init__(self, trainer: PolicyTrainer, tasks: QueuedTasks) -> None:
        self._trainer = trainer
        self._tasks = tasks

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < state.max_steps and not control.should_training_stop:
            self._tasks.play_ahead(self._trainer)


def around(callbacks: Sequence[TrainerCallback], trainer: PolicyTrainer) -> list[TrainerCallback]:
    """Returns a run's callbacks with those that must come before and after them."""
    tasks = trainer.batch_tasks
    if not isinstance(tasks, QueuedTasks) or not tasks.is_ahead:
        return list(callbacks)
    return [_SendFirst(trainer), *callbacks, _PlayAhead(trainer, tasks)]


def build(config: RunConfig, tasks: Sequence[Task], batch_tasks: int, rollouts: Rollouts) -> FixedTasks:
    """Returns what decides the tasks of a run's batches. tasks: `Prepared.train`. batch_tasks: tasks of a
    generation batch, over all ranks."""
    if config.overlap.max_staleness or config.rollout.dynamic_sampling:
        return QueuedTasks(config, tasks, batch_tasks, rollouts)
    return DrawnTasks(config, tasks, batch_tasks) if draws_tasks(config.dataset) else FixedTasks(tasks)
