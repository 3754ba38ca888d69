"""TRL's `rollout_func`: prompts are task keys; what comes back are verified rollouts as token lists.

Collected on the main process for all ranks: one place that knows how many rollouts are in flight, and one
writer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import zstandard

from gymexp.config.schema import RunConfig
from gymexp.errors import ServiceError
from gymexp.files import replacing
from gymexp.rollout.batch import build_batch
from gymexp.rollout.collect import Collector, check_failed_share
from gymexp.rollout.outcome import Failed, Outcome, Task, outcome_to_json
from gymexp.rollout.play import Distribution, Sampling
from gymexp.training.metrics import flat_groups, rollout_metrics
from gymexp.training.ranks import on_main_rank

if TYPE_CHECKING:
    from gymexp.training.sampling import Engine
    from gymexp.training.trainer import PolicyTrainer


def seed_of(run_seed: int, step: int | None, key: str, index: int) -> int:
    """The seed of one rollout: the same run replays the same draws. Below 2**31, which every engine takes."""
    digest = hashlib.blake2s(f"{run_seed}/{step}/{key}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def check_weights(outcomes: Sequence[Outcome], version: int) -> None:
    """Raises ServiceError for a rollout that an engine sampled with weights of another version."""
    for outcome in outcomes:
        if not isinstance(outcome, Failed) and outcome.rollout.weights_version not in (None, version):
            raise ServiceError(
                f"{outcome.rollout.task.key} was sampled with the weights of step "
                f"{outcome.rollout.weights_version}, where the policy's are those of step {version}"
            )


class Rollouts:
    """Plays tasks with the policy as it is: for training as `rollout_func`, for evaluation as `play`."""

    def __init__(
        self,
        config: RunConfig,
        collector: Collector | None,
        tasks: Mapping[str, Task],
        directory: Path,
        engine: Engine,
    ) -> None:
        """collector: on the first rank, which plays for all."""
        self._engine = engine
        self._config = config
        self._collector = collector
        self._tasks = tasks
        self._directory = directory
        self.seconds = 0.0  # spent in the last call
        self._step: int | None = None  # the one that is being trained, which may play several collections
        self._count: Counter[str] = Counter()  # rollouts of each task in it

    def __call__(self, prompts: list[str], trainer: PolicyTrainer) -> dict[str, list[Any]]:
        """See `trl.GRPOTrainer`, `rollout_func`: this rank's prompts, each repeated num_generations times."""
        began = time.monotonic()
        step = trainer.state.global_step
        outcomes = self._for_all_ranks(prompts, trainer, step)
        batch = build_batch(
            outcomes,
            placeholder_id=trainer.pad_token_id,
            mask_truncated=self._config.rollout.truncated == "masked",
        )
        self.seconds = time.monotonic() - began
        trainer.check_samples(outcomes)
        return {
            "prompt_ids": batch.prompt_ids,
            "completion_ids": batch.completion_ids,
            "logprobs": batch.logprobs,
            "env_mask": batch.env_mask,
            "reward": batch.rewards,
        }

    def play(
        self, keys: Sequence[str], weights_version: int, distribution: Distribution, held_out: bool
    ) -> list[Outcome]:
        """Rollouts of `keys` on this process, each with a seed of its own, also where a step plays a task
        again in a later collection. Raises RolloutError, Stopped.

        Held-out tasks are played with the same seeds every time, so that two evaluations differ by the policy
        alone.
        """
        assert self._collector is not None
        step = None if held_out else weights_version
        count = Counter[str]() if held_out else self._count_in(weights_version)
        samplings = []
        for key in keys:
            index = count[key]
            count[key] += 1
            env = self._config.env[self._tasks[key].env]
            samplings.append(
                Sampling(
                    **dataclasses.asdict(distribution),
                    max_output_tokens=env.max_output_tokens,
                    seed=seed_of(self._config.seed, step, key, index),
                )
            )
        with self._engine.sampling(weights_version):
            tasks = [self._tasks[key] for key in keys]
            outcomes = self._collector.collect(tasks, samplings, self._engine.tend)
        check_failed_share(outcomes, self._config.rollout.max_failed_share)
        check_weights(outcomes, weights_version)
        return outcomes

    def _count_in(self, step: int) -> Counter[str]:
        """Rollouts of each task that the step has played already."""
        if step != self._step:
            self._step, self._count = step, Counter()
        return self._count

    def _for_all_ranks(self, prompts: list[str], trainer: PolicyTrainer, step: int) -> list[Outcome]:
        from accelerate.utils import gather_object

        accelerator = trainer.accelerator
        everyone: list[str] = gather_object(prompts)

        def play() -> list[Outcome]:
            again = step == self._step
            softmax = Distribution(temperature=trainer.grpo.temperature)
            outcomes = self.play(everyone, step, softmax, held_out=False)
            self.write(f"step-{step + 1:06d}", outcomes, more=again)
            trainer.add_metrics(rollout_metrics(outcomes, self._config.env))
            num_generations = trainer.grpo.num_generations
            assert num_generations
            trainer.add_metrics({"groups_without_variance": flat_groups(outcomes, num_generations)})
            return outcomes

        outcomes = on_main_rank(accelerator, play)
        start = accelerator.process_index * len(prompts)
        return outcomes[start : start + len(prompts)]

    def write(self, name: str, outcomes: Sequence[Outcome], more: bool = False) -> None:
        """`rollouts/<name>.jsonl.zst`, an Outcome a line; there whole or not at all. more: behind those it
        has."""
        path = self._directory / f"{name}.jsonl.zst"
        # One frame again: zstandard's `decompress` reads no further.
        before = zstandard.decompress(path.read_bytes()) if more else b""
        lines = b"".join(orjson.dumps(outcome_to_json(outcome)) + b"\n" for outcome in outcomes)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(zstandard.compress(before + lines))
