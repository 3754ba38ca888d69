"""Sampling parameters, and pure functions that draw one token for every row of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request. Names and meanings are vLLM's.

    temperature: 0 is greedy. top_p: keeps the smallest set of tokens with this probability (1.0: all). top_k:
    keeps this many tokens (0: all). min_p: keeps the tokens with at least this share of the likeliest token's
    probability (0: all). repetition_penalty: for tokens of the prompt or the generation, divides positive
    logits and multiplies negative ones (1.0: no change). max_tokens: None for as many as the model's length
    allows. seed: the same seed, prompt and weights give the same tokens, whatever else is in the batch (up to
    float noise). stop: strings that end the generation; their tokens stay in it. stop_token_ids: ids that end
    the generation, besides the engine's eos_token_ids, which ignore_eos switches off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        rules = [
            ("temperature", "must be a finite number >= 0", 0 <= self.temperature < math.inf),
            ("top_p", "must be > 0 and <= 1", 0 < self.top_p <= 1),
            ("top_k", "must be >= 0 (0: all tokens)", self.top_k >= 0),
            ("min_p", "must be >= 0 and <= 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "must be a finite number > 0", 0 < self.repetition_penalty < math.inf),
            ("max_tokens", "must be >= 1", self.max_tokens is None or self.max_tokens >= 1),
            ("stop", "must not have an empty text", all(self.stop)),
        ]
        for name, rule, is_met in rules:
            if not is_met:
                raise ValueError(f"{name} {rule}, got {getattr(self, name)!r}")

    @property
    def cuts(self) -> bool:
        """Whether min_p, top_k or top_p remove tokens. None of them changes greedy sampling."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


def penalise_repetition(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[Sequence[int] | np.ndarray],
) -> torch.Tensor:
    """Returns logits [n, V] with each row's repetition_penalty applied to the tokens of its history.

    histories: ids of each row's prompt and generation. Source: CTRL (https://arxiv.org/abs/1909.05858),
    section 4.1. As in vLLM, the penalty comes before the temperature.
    """
    logits = logits.clone()
    for row, (row_params, history) in enumerate(zip(params, histories, strict=True)):
        penalty = row_params.repetition_penalty
        if penalty != 1:
            seen = torch.as_tensor(history, device=logits.device).unique()
            value = logits[row, seen]
            logits[row, seen] = torch.where(value > 0, value / penalty, value * penalty)
    return logits


def cut_tails(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Returns logits [n, V] with -inf for the tokens that min_p, top_k and top_p remove, in this order, which
    is vLLM's: tokens below min_p, tokens outside the top_k, tokens outside the smallest set with top_p of the
    remaining probability.
    """
    device, vocab = logits.device, logits.shape[-1]
    top_k = torch.tensor([p.top_k or vocab for p in params], device=device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], device=device, dtype=logits.dtype)[:, None]
    min_p = torch.tensor([p.min_p for p in params], device=device, dtype=logits.dtype)[:, None]
    probs = logits.softmax(-1)
    logits = logits.masked_fill(probs < probs.amax(-1, keepdim=True) * min_p, -math.inf)
    ordered, order = logits.sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(torch.arange(vocab, device=device) >= top_k, -math.inf)
    probs = ordered.softmax(-1)
    # The probability of all likelier tokens: 0 for the likeliest token, which is always kept.
    before = probs.cumsum(-1) - probs
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), -math.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def sample_tokens(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    histories: Sequence[Sequence[int] | np.ndarray] = (),
) -> tuple[list[int], list[float]]:
    """Returns one token id a row, and its log-probability (nats) under the distribution it was drawn from.

    logits: [n, V]. uniforms: a number in [0, 1) for each row. The row's token is the one at which the
    cumulative distribution passes this number, so it depends only on the row's own logits and number.
    histories: ids of each row's prompt and generation, for a repetition_penalty.

    The log-probability is the one after repetition_penalty, temperature, min_p, top_k and top_p, in this
    order. A greedy row (temperature 0) reports the one at temperature 1 without cuts, as vLLM does under
    processed_logprobs. The log-probability is NaN if logits are not finite.
    """
    device = logits.device
    logits = logits.float()
    if any(p.repetition_penalty != 1 for p in params):
        logits = penalise_repetition(logits, params, histories)
    if any(p.temperature not in (0, 1) for p in params):
        temperature = torch.tensor([p.temperature or 1.0 for p in params], device=device)
        logits = logits / temperature[:, None]
    cut = [row for row, p in enumerate(params) if p.cuts]
    if cut:
        logits = logits.clone()
        logits[cut] = cut_tails(logits[cut], [params[row] for row in cut])
    logprobs = logits.log_softmax(-1)
    best = logprobs.argmax(-1, keepdim=True)
    if all(p.temperature == 0 for p in params):
        ids = best
    else:
        # float64, as float32 would lose the tail of a large vocabulary in the rounding of the sum.
        wide = torch.float32 if device.type == "mps" else torch.float64
        cumulative = logprobs.exp().cumsum(-1, dtype=wide)
        marks = torch.tensor(uniforms, device=device, dtype=wide)[:, None] * cumulative[:, -1:]
        ids = torch.searchsorted(cumulative, marks, right=True)
        greedy = torch.tensor([p.temperature == 0 for p in params], device=device)[:, None]
        # Rounding may carry a mark past the end of the vocabulary.
        ids = torch.where(greedy | (ids >= logits.shape[-1]), best, ids)
    chosen = logprobs.gather(-1, ids)
    return ids[:, 0].tolist(), chosen[:, 0].tolist()
