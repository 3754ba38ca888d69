"""The tasks of each generation batch where a curriculum draws them: one decision for all ranks, made when the
batch is played, and kept in checkpoints.

The sampler cannot decide: transformers, accelerate and workers of the data loader read it ahead of training
(a whole step and one batch, and more with workers), when the results of earlier batches are not known yet. So
it yields places of a batch, and a place becomes a task once the batch is played.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymexp.config.schema import RunConfig
from gymexp.data.curriculum import Curriculum, from_json, to_json
from gymexp.data.weights import Weights
from gymexp.errors import RunDirectoryError
from gymexp.record.metric_names import name_of
from gymexp.rollout.outcome import Outcome, Task
from gymexp.training.batches import PlaceSampler, TaskSampler
from gymexp.training.ranks import on_main_rank

if TYPE_CHECKING:
    from gymexp.training.trainer import PolicyTrainer

_FILE = "curriculum.json"


class FixedTasks:
    """Leaves the tasks of the batches to the sampler. Every rank must call each method, in training's order.

    prompts: of the trainer's data set, whose indices `sampler` yields.
    """

    sampler: type[TaskSampler] = TaskSampler

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.prompts = [task.key for task in tasks]

    def fill(self, inputs: Any, trainer: PolicyTrainer) -> Any:
        """Returns this rank's part of a batch that is about to be played, with the tasks as prompts."""
        return inputs

    def learn(self, rewards: Sequence[float | None], trainer: PolicyTrainer) -> None:
        """Takes the rewards of the batch that was filled last. rewards: of this rank's part."""

    def landed(self, step: int) -> list[Outcome]:
        """Returns the rollouts that wait for a later batch, in the step that trains the weights of `step`. On
        the first rank only."""
        return []

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Lets an evaluation play within the block."""
        yield

    def save(self, checkpoint: Path, trainer: PolicyTrainer) -> None:
        """Writes what the next batches depend on to a checkpoint of the last finished step."""

    def begin(self, trainer: PolicyTrainer, checkpoint: Path | None) -> None:
        """Begins the training, from a checkpoint or, if that is None, from the start."""


class DrawnTasks(FixedTasks):
    """Draws the tasks of the batches. The first rank draws and learns for all ranks."""

    sampler = PlaceSampler

    def __init__(self, config: RunConfig, tasks: Sequence[Task], batch_tasks: int) -> None:
        """tasks: each once. batch_tasks: of a generation batch, over all ranks."""
        keys: dict[str, list[str]] = defaultdict(list)
        for task in tasks:
            keys[task.env].append(task.key)
        by_difficulty = config.dataset.sampling == "difficulty"
        self._curriculum = Curriculum(keys, Weights.of(config), config.dataset.seed, by_difficulty)
        self._batch_tasks = batch_tasks
        self.prompts = [str(place) for place in range(batch_tasks)]  # they stand for tasks until `fill`
        # An interrupted step is played again, so its checkpoint has the state from before its draws.
        self._step = -1
        self._before = self._curriculum.snapshot()

    def fill(self, inputs: Any, trainer: PolicyTrainer) -> Any:
        step = trainer.state.global_step
        keys = on_main_rank(trainer.accelerator, lambda: self._draw(step))
        return [dict(row) | {"prompt": keys[int(row["prompt"])]} for row in inputs]

    def _draw(self, step: int) -> list[str]:
        if step != self._step:
            self._step, self._before = step, self._curriculum.snapshot()
        return self._curriculum.draw(step, self._batch_tasks)

    def learn(self, rewards: Sequence[float | None], trainer: PolicyTrainer) -> None:
        from accelerate.utils import gather_object

        everyones: list[float | None] = gather_object(list(rewards))
        num_generations = trainer.grpo.num_generations
        assert num_generations
        if trainer.accelerator.is_main_process:
            metrics = self._curriculum.metrics(trainer.state.global_step)
            for env, of_env in metrics.items():
                trainer.add_metrics({name_of(env, name): value for name, value in of_env.items()})
            self._curriculum.learn(equal_groups(everyones, num_generations))

    def save(self, checkpoint: Path, trainer: PolicyTrainer) -> None:
        if not trainer.accelerator.is_main_process:
            return
        is_begun = trainer.state.global_step == self._step  # the next step, whose batch is played again
        state = self._before if is_begun else self._curriculum.snapshot()
        (checkpoint / _FILE).write_text(json.dumps(to_json(state)))

    def begin(self, trainer: PolicyTrainer, checkpoint: Path | None) -> None:
        if checkpoint is None:
            return
        try:
            self._curriculum.restore(from_json(json.loads((checkpoint / _FILE).read_text())))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise RunDirectoryError(
                f"{checkpoint / _FILE} must have the state of the draws, as a run with dataset.schedule or "
                f"dataset.sampling=difficulty writes it: {type(error).__name__}: {error}"
            ) from None


def equal_groups(rewards: Sequence[float | None], num_generations: int) -> list[bool | None]:
    """Returns for each group of `num_generations` rollouts in a row whether its rewards are all equal; None
    if it has fewer than two rewards."""
    groups = [rewards[i : i + num_generations] for i in range(0, len(rewards), num_generations)]
    known = [[reward for reward in group if reward is not None] for group in groups]
    return [len(set(group)) == 1 if len(group) > 1 else None for group in known]
