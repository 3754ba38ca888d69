"""Less padding with unchanged results: rows of similar length share a micro-batch, which is cut to its
longest row.

TRL pads a generation batch to its longest rollout. If single-turn and multi-turn environments share a batch,
most of it is padding. On a CPU, or with long contexts, the trainer then spends most of its time on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

_OVER_COMPLETION = (  # (B, T), right-padded
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
)
_OVER_PROMPT = ("prompt_ids", "prompt_mask")  # (B, P), left-padded
# Losses that give a row the same weight in any micro-batch of its optimizer step. `bnpo` does not.
_ORDER_FREE = frozenset(("grpo", "dr_grpo", "dapo", "cispo"))


def may_regroup(args: GRPOConfig, with_router_loss: bool) -> bool:
    """Returns whether the objective of an optimizer step stays the same if its rows change micro-batches.

    TRL computes four values within a micro-batch: the mean over its tokens for bnpo, for the entropy bonus
    and for a router's loss, and the quantile of its entropies. Regrouping rows by length would change these
    values. Importance ratios of whole sequences are exact only if both passes over a row see the same
    micro-batch.
    """
    return (
        args.loss_type in _ORDER_FREE
        and args.steps_per_generation == args.gradient_accumulation_steps
        and args.importance_sampling_level == "token"
        and args.entropy_coef == 0
        and not args.use_adaptive_entropy
        and args.top_entropy_quantile == 1
        and not with_router_loss
    )


def trim(inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns a micro-batch without the columns that are padding in all of its rows. The keys are those that
    TRL's `_compute_loss` reads."""
    prompt = max(1, int(inputs["prompt_mask"].sum(1).max()))
    completion = max(1, int(inputs["completion_mask"].sum(1).max()))
    trimmed = dict(inputs)
    for name in _OVER_PROMPT:
        trimmed[name] = inputs[name][:, -prompt:]
    for name in _OVER_COMPLETION:
        value = inputs.get(name)
        if value is not None and value.size(1) > 1:  # A ratio of shape (B, 1) belongs to whole sequences.
            trimmed[name] = value[:, :completion]
    return trimmed


def group_by_length(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the same rows, sorted by their number of tokens, in as many micro-batches of the same sizes."""
    lengths = torch.cat([b["prompt_mask"].sum(1) + b["completion_mask"].sum(1) for b in batches])
    return regroup(batches, torch.argsort(lengths, stable=True))


def regroup(batches: Sequence[dict[str, Any]], order: torch.Tensor) -> list[dict[str, Any]]:
    """Returns the same rows in another order, in as many micro-batches of the same sizes."""
    if len(batches) < 2:
        return list(batches)
    rows = batches[0]["prompt_ids"].size(0)
    joined = {
        name: torch.cat([b[name] for b in batches])[order]
        for name, value in batches[0].items()
        if isinstance(value, torch.Tensor) and value.dim() > 0 and value.size(0) == rows
    }
    parts = {name: value.split(rows) for name, value in joined.items()}
    return [batch | {name: part[i] for name, part in parts.items()} for i, batch in enumerate(batches)]


def score_by_length(
    score: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_completion: int,
    batch_size: int,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the scores of the last `num_completion` columns of every row, (B, num_completion). Columns that
    are padding in all rows of a part are 0.

    input_ids and attention_mask: (B, P + num_completion), prompts left-padded and completions right-padded.
    score: takes the ids and the mask of at most `batch_size` rows and the number of columns to score, and
    returns the scores of these columns. order (B): of the rows; None: by their number of tokens.
    """
    num_prompt = input_ids.size(1) - num_completion
    scores: torch.Tensor | None = None
    order = torch.argsort(attention_mask.sum(1), stable=True) if order is None else order
    for rows in order.split(batch_size):
        mask = attention_mask[rows]
        prompt = max(1, int(mask[:, :num_prompt].sum(1).max()))
        completion = max(1, int(mask[:, num_prompt:].sum(1).max()))
        columns = slice(num_prompt - prompt, num_prompt + completion)
        part = score(input_ids[rows, columns], mask[:, columns], completion)
        if scores is None:
            scores = part.new_zeros(input_ids.size(0), num_completion)
        scores[rows, :completion] = part
    assert scores is not None, "no rows"
    return scores


def effective_sample(weights: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns (sum, sum of squares, number) of the importance weights that training uses.

    weights: (B, T) of tokens, or (B, 1) of whole rollouts. mask: (B, T), 1 for tokens that are trained on.
    """
    counted = mask.bool() if weights.size(1) > 1 or mask.size(1) == 1 else mask.bool().any(1, keepdim=True)
    used = weights[counted].double()
    return used.sum(), (used**2).sum(), torch.ones_like(used).sum()
