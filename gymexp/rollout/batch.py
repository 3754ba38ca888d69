"""Turns outcomes into TRL's input: lists with an entry a rollout, in the order of the prompts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gymexp.rollout.outcome import Failed, Outcome, Truncated
from gymexp.rollout.tokens import flatten


@dataclass(frozen=True)
class Batch:
    """The result of TRL's `rollout_func`: lists of B entries, one for each rollout.

    prompt_ids: the first turn's prompt. completion_ids (T each): the policy's sampled tokens and, between its
    turns, the environment's tokens. env_mask (T): 1 for tokens of the policy, 0 for tokens of the
    environment. logprobs (T): nats, 0.0 for tokens of the environment. rewards: None for a rollout without a
    reward, which TRL leaves out of its group's mean and deviation.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    env_mask: list[list[int]]
    logprobs: list[list[float]]
    rewards: list[float | None]


def build_batch(outcomes: Sequence[Outcome], *, placeholder_id: int, mask_truncated: bool) -> Batch:
    """Returns the batch of the outcomes. A failed rollout has no tokens to train on, and becomes a single
    masked `placeholder_id` without a reward.

    mask_truncated: whether to mask truncated rollouts. A masked rollout keeps its reward in the group's
    baseline but gets no gradient, as DAPO's overlong filtering does (https://arxiv.org/abs/2503.14476,
    section 3.4).
    """
    batch = Batch([], [], [], [], [])
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            prompt, completion, mask, logprobs, reward = [placeholder_id], [placeholder_id], [0], [0.0], None
        else:
            assert outcome.rollout.usage is None, "a rollout without token ids cannot be trained on"
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
