"""The log-probabilities with which the loss compares the policy's: `old_per_token_logps` of TRL.

With rollout.correction=behavior they are the engine's, so that PPO's clip bounds the distance from the policy
that sampled. This is verl's `bypass_mode`, and how TRL's own AsyncGRPOTrainer trains. Otherwise they are the
trainer's, which TRL computes in a pass of its own if it needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from gymexp.training import padding

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig


def is_pass_unused(args: GRPOConfig, correction: str) -> bool:
    """Returns whether TRL makes a pass for the trainer's old log-probabilities that the loss does not read.
    TRL makes one where several optimizer steps train on a batch."""
    generate_every = args.steps_per_generation * args.num_iterations  # pyright: ignore[reportOptionalOperand]
    return correction == "behavior" and args.gradient_accumulation_steps % generate_every != 0


def for_loss(inputs: Mapping[str, Any], correction: str) -> dict[str, Any]:
    """Returns a micro-batch with the old log-probabilities of the correction. The engine's are finite, as a
    rollout with others is none (`gymexp.rollout.tokens`)."""
    if correction != "behavior":
        return dict(inputs)
    return {**inputs, "old_per_token_logps": inputs["sampling_per_token_logps"]}


def rescored(batch: dict[str, Any], score: Callable[..., Any], model: Any) -> dict[str, Any]:
    """Returns the micro-batch with the trainer's old log-probabilities computed again, in a pass that has the
    same shape as the update's pass.

    In bfloat16 a row's log-probabilities depend on the shape of the batch around it. In the mean over a
    rollout, this becomes a bias of the order of trainer=gspo's clip range.
    """
    if (old := batch.get("old_per_token_logps")) is None:
        return batch
    part = padding.trim(batch)
    ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
    mask = torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1)
    width = part["completion_ids"].size(1)
    with torch.no_grad():
        logprobs = score(model, ids, mask, width)[0]
    again = old.clone()
    again[:, :width] = logprobs
    return batch | {"old_per_token_logps": again}
