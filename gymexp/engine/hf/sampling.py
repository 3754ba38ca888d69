"""Sampling parameters, and drawing one token for every row of a batch. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled; names and meanings are vLLM's.

    temperature: 0 is greedy. top_p, top_k: nucleus and count that are kept (1.0 and 0: everything). min_p: a
    token is kept if it has at least this times the likeliest one's probability (0: everything).
    repetition_penalty: divides the positive logits of tokens of the prompt or the generation, and multiplies
    their negative ones (1.0: as they are). max_tokens: None is as many as the model's length allows. seed:
    the same seed, prompt and weights give the same tokens, whatever else is in the batch (up to float noise).
    stop: texts that end the generation; their tokens stay in it. stop_token_ids: ids that end it, besides the
    engine's eos_token_ids, which ignore_eos switches off.
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
            ("stop", "must not hold an empty text", all(self.stop)),
        ]
        for name, rule, holds in rules:
            if not holds:
                raise ValueError(f"{name} {rule}, got {getattr(self, name)!r}")

    @property
    def cuts(self) -> bool:
        """Whether min_p, top_k or top_p take tokens away. None of them changes greedy sampling."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


def penalise_repetition(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[Sequence[int] | np.ndarray],
) -> torch.Tensor:
    """Logits [n, V] after each row's repetition_penalty on the tokens of its history, prompt included.

    Source: CTRL (https://arxiv.org/abs/1909.05858), section 4.1, as vLLM applies it: before the temperature.
    """
    logits = logits.clone()
    for row, (one, history) in enumerate(zip(params, histories, strict=True)):
        if one.repetition_penalty != 1:
            seen = torch.as_tensor(history, device=logits.device).unique()
            value = logits[row, seen]
            penalty = one.repetition_penalty
            logits[row, seen] = torch.where(value > 0, value / penalty, value * penalty)
    return logits


def cut_tails(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Logits [n, V] with -inf below min_p, then outside the top_k tokens, then outside the smallest set that
    holds top_p of what is left: vLLM's order."""
    device, vocab = logits.device, logits.shape[-1]
    top_k = torch.tensor([p.top_k or vocab for p in params], device=device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], device=device, dtype=logits.dtype)[:, None]
    min_p = torch.tensor([p.min_p for p in params], device=device, dtype=logits.dtype)[:, None]
    probs = logits.softmax(-1)
    logits = logits.masked_fill(probs < probs.amax(-1, keepdim=True) * min_p, -math.inf)
    ordered, order = logits.sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(torch.arange(vocab, device=device) >= top_k, -math.inf)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # what the likelier tokens hold already; the first is always kept
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), -math.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def sample_tokens(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    histories: Sequence[Sequence[int] | np.ndarray] = (),
) -> tuple[list[int], list[float]]:
    """One token a row, and its log-probability under the distribution it was drawn from.

    logits: [n, V]. uniforms: one number in [0, 1) a row; the token is where the cumulative distribution
    passes it, so a row's choice depends on its own logits and number alone. histories: the ids of each row's
    prompt and of what it has generated, for a repetition_penalty. The log-probability is that after
    repetition_penalty, temperature, min_p, top_k and top_p, in this order; a greedy row (temperature 0)
    reports the one at temperature 1, uncut, as vLLM does under processed_logprobs. Where logits are not
    finite, it is NaN.
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
        # float64: in float32 the tail of a large vocabulary would be lost in the rounding of the sum.
        wide = torch.float32 if device.type == "mps" else torch.float64
        cumulative = logprobs.exp().cumsum(-1, dtype=wide)
        marks = torch.tensor(uniforms, device=device, dtype=wide)[:, None] * cumulative[:, -1:]
        ids = torch.searchsorted(cumulative, marks, right=True)
        greedy = torch.tensor([p.temperature == 0 for p in params], device=device)[:, None]
        ids = torch.where(
            greedy | (ids >= logits.shape[-1]), best, ids
        )  # rounding may carry a mark past the end
    chosen = logprobs.gather(-1, ids)
    return ids[:, 0].tolist(), chosen[:, 0].tolist()
