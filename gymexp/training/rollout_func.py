"""The `rollout_func` that TRL calls: it takes task keys as prompts and returns verified rollouts as token
lists.

The main process collects the rollouts of all ranks, so that one place limits the rollouts in flight, and one
process writes their files. It sends each rank the rollouts of that rank's own prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gymexp.config.schema import RunConfig
from gymexp.errors import RolloutError, ServiceError
from gymexp.rollout.ahead import Landed
from gymexp.rollout.batch import build_batch
from gymexp.rollout.collect import Collector
from gymexp.rollout.failed_share import check_failed_share
from gymexp.rollout.group_queue import Batch as GroupBatch
from gymexp.rollout.group_queue import GroupQueue
from gymexp.rollout.outcome import Failed, Outcome, Task, task_of
from gymexp.rollout.packed import pack, unpack
from gymexp.rollout.play import Distribution, Sampling
from gymexp.rollout.rollout_files import RolloutWriter
from gymexp.rollout.trained import Trained
from gymexp.training.metrics import group_metrics, queue_metrics, rollout_metrics, staleness_metrics
from gymexp.training.ranks import gathered_on_main_rank, part_of_main_rank
from gymexp.training.trained_values import Row, trained_of

if TYPE_CHECKING:
    from gymexp.training.engine_client import Engine
    from gymexp.training.trainer import PolicyTrainer

# The records of training keep a value for each token up to this number of tokens a step. Such a step writes
# about 20 MB with the log-probabilities and the weights of each token.
_MAX_KEPT_TOKENS = 1_000_000


def seed_of(run_seed: int, step: int | None, key: str, index: int) -> int:
    """Returns the seed of one rollout, below 2**31, which every engine accepts. A repeated run gets the same
    seeds. step: None for held-out tasks."""
    digest = hashlib.blake2s(f"{run_seed}/{step}/{key}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def check_weights(outcomes: Sequence[Outcome], version: int, max_staleness: int = 0) -> None:
    """Raises ServiceError if an engine sampled a rollout with weights of a later version than `version`, or
    of one that is more than `max_staleness` older."""
    for outcome in outcomes:
        if isinstance(outcome, Failed) or outcome.rollout.weights_version is None:
            continue
        if not 0 <= version - outcome.rollout.weights_version <= max_staleness:
            allowed = f" and overlap.max_staleness={max_staleness}" if max_staleness else ""
            raise ServiceError(
                f"{outcome.rollout.task.key} was sampled with the weights of step "
                f"{outcome.rollout.weights_version}, where the policy's are those of step {version}{allowed}"
            )


class Rollouts:
    """Plays tasks with the current policy. TRL calls the object as `rollout_func`; evaluation calls
    `play`."""

    def __init__(
        self,
        config: RunConfig,
        collector: Collector | None,
        tasks: Mapping[str, Task],
        writer: RolloutWriter | None,
        engine: Engine,
        send: Callable[[str, Sequence[Outcome], Sequence[float | None] | None], None] | None = None,
    ) -> None:
        """collector, writer: given on the first rank only, which plays for all ranks. tasks: all tasks by
        key. send: gets the name and the outcomes of each file, for the tracker, and the advantages of those
        of training."""
        self._engine = engine
        self._config = config
        self._collector = collector
        self._tasks = tasks
        self._writer = writer
        self._send = send
        self.seconds = 0.0  # duration of the last call, or of the wait for its batch
        self.waited = 0.0  # of this, before the call
        self._batch: GroupBatch | None = None  # that the next call returns; None: the call plays its prompts
        self._step: int | None = None  # the current training step, which may need several collections
        self._num_played: Counter[str] = Counter()  # rollouts of each task in the current step
        self._rows: Sequence[Row] = ()  # this rank's rollouts of the last collection
        self._count = _Count(-1)  # on the first rank
        self._unsent: Sequence[Outcome] = ()  # of the last collection, whose advantages are not known yet

    def __call__(self, prompts: list[str], trainer: PolicyTrainer) -> dict[str, list[Any]]:
        """Plays this rank's prompts (task keys, each repeated num_generations times) and returns the batch in
        the form that `rollout_func` of `trl.GRPOTrainer` must return."""
        began = time.monotonic()
        step = trainer.state.global_step
        part = self._part_of(prompts, trainer, step)
        outcomes, self._rows = part.outcomes, part.rows
        batch = build_batch(
            outcomes,
            placeholder_id=trainer.pad_token_id,
            mask_truncated=self._config.rollout.truncated == "masked",
        )
        self.seconds = self.waited + time.monotonic() - began
        self.waited = 0.0
        trainer.check_samples(outcomes)
        return {
            "prompt_ids": batch.prompt_ids,
            "completion_ids": batch.completion_ids,
            "logprobs": batch.logprobs,
            "env_mask": batch.env_mask,
            "reward": batch.rewards,
        }

    def play(
        self,
        keys: Sequence[str],
        weights_version: int,
        distribution: Distribution,
        held_out: bool,
        keep: Callable[[Sequence[Outcome]], None],
    ) -> list[Outcome]:
        """Plays the tasks of `keys` on this process and returns their outcomes. Every rollout has its own
        seed, even if a step plays a task again in a later collection.

        Held-out tasks get the same seeds every time, so that two evaluations differ only by the policy.
        keep: gets the outcomes, before they may raise an error. Raises RolloutError if too many rollouts
        fail, Stopped if the run must end, ServiceError if an engine sampled with other weights.
        """
        assert self._collector is not None
        step = None if held_out else weights_version
        num_played = Counter[str]() if held_out else self._played_in(weights_version)
        samplings = []
        for key in keys:
            samplings.append(self._sampling(key, step, num_played[key], distribution))
            num_played[key] += 1
        with self._engine.sampling(weights_version):
            tasks = [self._tasks[key] for key in keys]
            outcomes = self._collector.collect(tasks, samplings, self._engine.tend)
        keep(outcomes)
        check_failed_share(outcomes, self._config.rollout.max_failed_share)
        check_weights(outcomes, weights_version)
        return outcomes

    def _sampling(self, key: str, step: int | None, index: int, distribution: Distribution) -> Sampling:
        return Sampling(
            **dataclasses.asdict(distribution),
            max_output_tokens=self._config.env[self._tasks[key].env].max_output_tokens,
            seed=seed_of(self._config.seed, step, key, index),
        )

    def start(
        self, key: str, step: int, indices: Sequence[int], distribution: Distribution, landed: Landed
    ) -> None:
        """Begins to play a group of one task, on the first rank. step, indices: decide the seeds. landed:
        gets the outcomes, or an error, in another thread."""
        assert self._collector is not None
        samplings = [self._sampling(key, step, index, distribution) for index in indices]
        self._collector.ahead.start([self._tasks[key]] * len(samplings), samplings, landed)

    def forget(self, num_rollouts: int) -> None:
        """Takes rollouts of groups out of the progress, on the first rank."""
        assert self._collector is not None
        self._collector.ahead.forget(num_rollouts)

    def take(self, queue: GroupQueue, step: int) -> list[str]:
        """Waits on the first rank for the queue's batch, which the next call returns. Returns the tasks of
        its groups. Raises what `play` does."""
        assert self._collector is not None
        try:
            with self._engine.sampling(step):
                queue.advance(step)
                if self._config.overlap.max_staleness:
                    self._engine.tend()  # for an engine that is back, also where nothing has to be waited for
                batch = queue.take(self._engine.tend)
        except RolloutError:
            self._write_left_out(step, queue.left_out)
            raise
        self._write_left_out(step, batch.left_out)
        outcomes = batch.outcomes
        self._collector.follow(outcomes)
        self.write(f"step-{step + 1:06d}", batch.trained, len(batch.groups[0]))
        check_failed_share(outcomes, self._config.rollout.max_failed_share)
        check_weights(outcomes, step, self._config.overlap.max_staleness)
        self._batch = batch
        return [task_of(group[0]).key for group in batch.groups]

    def landed(self, queue: GroupQueue, step: int) -> list[Outcome]:
        """Returns on the first rank the rollouts that wait for a later batch, group after group. First waits
        for one with tokens of the current weights, those of `step`, if one may still land."""

        def is_current(group: Sequence[Outcome]) -> bool:
            turns = [turn for one in group if not isinstance(one, Failed) for turn in one.rollout.turns]
            return any(version == step for turn in turns for version, _ in turn.versions)

        groups = queue.landed(is_current, self._engine.tend)
        return [outcome for group in groups for outcome in group]

    def _write_left_out(self, step: int, groups: Sequence[Sequence[Outcome]]) -> None:
        if groups and self._writer:
            outcomes = [outcome for group in groups for outcome in group]
            self._writer.write(f"filtered-{step + 1:06d}", outcomes, len(groups[0]))

    def _played_in(self, step: int) -> Counter[str]:
        """Returns the number of rollouts that `step` has already played of each task."""
        if step != self._step:
            self._step, self._num_played = step, Counter()
        return self._num_played

    def _part_of(self, prompts: list[str], trainer: PolicyTrainer, step: int) -> _Part:
        """Plays the prompts of all ranks on the first rank. Returns each rank what its own came to."""
        from accelerate.utils import gather_object

        all_prompts: list[str] = gather_object(prompts)

        def play() -> list[_Part]:
            outcomes = self._play_for_all(all_prompts, trainer, step)
            count = self._count if step == self._count.step else _Count(step)
            rows, self._count = count.after(outcomes)
            size = len(prompts)  # of each rank
            starts = range(0, len(all_prompts), size)
            return [_Part(outcomes[at : at + size], rows[at : at + size]) for at in starts]

        return part_of_main_rank(trainer.accelerator, play, _Part.packed, _Part.unpacked)

    def _play_for_all(self, all_prompts: list[str], trainer: PolicyTrainer, step: int) -> list[Outcome]:
        earlier = Counter(self._num_played) if step == self._step else None
        softmax = Distribution(temperature=trainer.grpo.temperature)
        batch, self._batch = self._batch, None
        num_generations = trainer.grpo.num_generations
        assert num_generations

        def keep(outcomes: Sequence[Outcome]) -> None:
            self.write(f"step-{step + 1:06d}", outcomes, num_generations, earlier)

        if batch:
            outcomes = batch.trained
        else:
            outcomes = self.play(all_prompts, step, softmax, held_out=False, keep=keep)
        played = batch.outcomes if batch else outcomes
        trainer.add_metrics(rollout_metrics(played, self._config.env))
        trainer.add_metrics(group_metrics(played, num_generations, self._config.env))
        if batch:
            trainer.add_metrics(queue_metrics(batch))
        if max_staleness := self._config.overlap.max_staleness:
            trainer.add_metrics(staleness_metrics(outcomes, step, max_staleness))
        return outcomes

    def write(
        self,
        name: str,
        outcomes: Sequence[Outcome],
        group_size: int,
        earlier: Mapping[str, int] | None = None,
    ) -> None:
        """Writes outcomes to a file of rollouts, as `RolloutWriter.write` does. On the first rank only."""
        assert self._writer is not None
        self._writer.write(name, outcomes, group_size, earlier)
        if not name.startswith("eval-"):
            self._unsent = outcomes  # `write_trained` sends them with their advantages
        elif self._send:
            self._send(name, outcomes, None)

    def write_trained(self, batch: Mapping[str, Any], trainer: PolicyTrainer) -> None:
        """Writes what the trainer made of the rollouts that the last call played, and sends these to the
        tracker. Every rank must call it.

        batch: this rank's part, as TRL's `_generate_and_score_completions` returns it.
        """
        trained: list[Trained] = gathered_on_main_rank(trainer.accelerator, trained_of(batch, self._rows))
        num_generations = trainer.grpo.num_generations
        assert num_generations
        if self._writer:
            name = f"step-{self._count.step + 1:06d}"
            self._writer.write_trained(name, trained, num_generations, self._count.first)
            if self._send:
                self._send(name, self._unsent, [one.advantage for one in trained])
            self._unsent = ()


@dataclass(frozen=True)
class _Part:
    """The rollouts of a collection that are a rank's own, and what the records of training keep of each."""

    outcomes: Sequence[Outcome]
    rows: Sequence[Row]

    def packed(self) -> Any:
        return pack(self.outcomes), self.rows

    @classmethod
    def unpacked(cls, values: Any) -> _Part:
        outcomes, rows = values
        return cls(unpack(outcomes), rows)


@dataclass(frozen=True)
class _Count:
    """The rollouts of a step so far, over all ranks, for the records of training.

    step: optimizer steps done before. first: the number of the last collection's first rollout in its step.
    """

    step: int
    first: int = 0
    num_rollouts: int = 0
    num_tokens: int = 0

    def after(self, outcomes: Sequence[Outcome]) -> tuple[list[Row], _Count]:
        """Returns the rows of one more collection of the step, and the count after it. outcomes: of all
        ranks, in their order."""
        rows, num_tokens = [], self.num_tokens
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                rows.append(Row(1, has_reward=False, keeps_tokens=False))
                continue
            turns = outcome.rollout.turns
            size = len(turns[-1].prompt_ids) + len(turns[-1].completion_ids) - len(turns[0].prompt_ids)
            num_tokens += size
            rows.append(Row(size, has_reward=True, keeps_tokens=num_tokens <= _MAX_KEPT_TOKENS))
        return rows, _Count(self.step, self.num_rollouts, self.num_rollouts + len(rows), num_tokens)
