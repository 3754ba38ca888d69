"""Takes from TRL's batch what the trainer made of each rollout, for the run's records. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gymexp.rollout.trained import Trained

_DECIMALS = 4


@dataclass(frozen=True)
class Row:
    """A rollout of the batch. num_tokens: of its completion. has_reward: False for a failed rollout, which is
    a placeholder. keeps_tokens: whether the records keep a value for each of its tokens."""

    num_tokens: int
    has_reward: bool
    keeps_tokens: bool


def trained_of(batch: Mapping[str, Any], rows: Sequence[Row]) -> list[Trained]:
    """Returns what the trainer made of each rollout of this rank's batch.

    batch: what TRL's `_generate_and_score_completions` returns: tensors of (B) or (B, T), whose rows are
    still in the order of the rollouts. rows: B. `old_per_token_logps` are the trainer's before the update: of
    TRL's pass if it makes one, else of the training pass (`gymexp.training.training_pass`). With sequence
    ratios the loss uses those of a further pass, which differ by rounding (`old_logprobs.rescored`).
    """
    mask = (batch["completion_mask"] * batch.get("tool_mask", 1)).bool().cpu().numpy()
    advantages = batch["advantages"].float().cpu().tolist()
    names = ("old_per_token_logps", "sampling_per_token_logps", "ref_per_token_logps")
    weights = _numpy(batch.get("importance_sampling_ratio"))
    old, sampling, reference = (_numpy(batch.get(name)) for name in names)
    trained = []
    for i, row in enumerate(rows):
        own = mask[i, : row.num_tokens] & row.has_reward
        advantage = round(advantages[i], 6) if row.has_reward else None
        if not own.any():
            trained.append(Trained(advantage, 0))
            continue
        ratio = None
        if old is not None and sampling is not None:
            ratio = _max_ratio(old[i, : own.size][own], sampling[i, : own.size][own])
        tokens: dict[str, Any] = {}
        if row.keeps_tokens:
            tokens = {"logprobs": _masked(old, i, own), "ref_logprobs": _masked(reference, i, own)}
            if weights is not None and weights.shape[1] == 1 < mask.shape[1]:  # of whole sequences
                tokens["weights"] = round(float(weights[i, 0]), _DECIMALS)
            else:
                tokens["weights"] = _masked(weights, i, own)
        trained.append(Trained(advantage, int(own.sum()), ratio, **tokens))
    return trained


def _numpy(values: torch.Tensor | None) -> np.ndarray | None:
    return None if values is None else values.float().cpu().numpy()


def _masked(values: np.ndarray | None, row: int, mask: np.ndarray) -> np.ndarray | None:
    """Returns a row's values for its completion tokens, rounded, with NaN where the mask is False."""
    if values is None:
        return None
    rounded = np.round(values[row, : mask.size], _DECIMALS) + np.float32(0)  # no -0.0
    return np.where(mask, rounded, np.float32(math.nan))


def _max_ratio(trainer: np.ndarray, engine: np.ndarray) -> float | None:
    """Returns the largest ratio of two probabilities, given as log-probabilities; None if it is no number."""
    difference = float(np.max(trainer.astype(np.float64) - engine))
    ratio = math.exp(min(difference, 700.0))
    return round(ratio, _DECIMALS) if math.isfinite(ratio) else None
