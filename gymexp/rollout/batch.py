"""Outcomes become what TRL takes: lists with one entry a rollout, in the order of the prompts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gymexp.rollout.outcome import Failed, Outcome, Truncated
from gymexp.rollout.tokens import flatten


@dataclass(frozen=True)
class Batch:
    """What `rollout_func` returns, one entry a rollout (B of them).

    prompt_ids: the first turn's prompt. completion_ids (T each): what the policy sampled and, between its
    turns, what the environment said. env_mask (T): 1 where the policy sampled. logprobs (T): nats, 0.0 where
    the environment spoke. rewards: None where there is none; TRL leaves such a rollout out of its group's
    mean and deviation.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    env_mask: list[list[int]]
    logprobs: list[list[float]]
    rewards: list[float | None]


def build_batch(outcomes: Sequence[Outcome], *, placeholder_id: int, mask_truncated: bool) -> Batch:
    """A rollout without tokens to train on (a failure) becomes one masked `placeholder_id` without a reward.

    mask_truncated: a truncated rollout keeps its reward in the group's baseline but gets no gradient, as
    DAPO's overlong filtering does (https://arxiv.org/abs/2503.14476, section 3.4).
    """
    batch = Batch([], [], [], [], [])
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            prompt, completion, mask, logprobs, reward = [placeholder_id], [placeholder_id], [0], [0.0], None
        else:
            prompt, completion, mask, logprobs = flatten(outcome.rollout.turns)
            reward = outcome.rollout.reward
            if mask_truncated and isinstance(outcome, Truncated):
                mask = [0] * len(mask)
        batch.prompt_ids.append(prompt)
        batch.completion_ids.append(completion)
        batch.env_mask.append(mask)
        batch.logprobs.append(logprobs)
        batch.rewards.append(reward)
    return batch
