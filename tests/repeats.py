"""How often a generation repeats, place by place, tokens that were drawn elsewhere; and how often by chance.

Independent draws repeat the token x at a place with the probability that the policy gives x there. So the
number of repeats less the sum of these probabilities is a martingale, whatever was drawn before. The
probabilities come from transformers' own forward pass, not from gymexp.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Repeats:
    """positions that were compared, how many repeated, how many would by chance, and the variance of that."""

    positions: int = 0
    seen: int = 0
    expected: float = 0.0
    variance: float = 0.0

    def __add__(self, other: Repeats) -> Repeats:
        return Repeats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def z(self) -> float:
        """Standard normal where draws are independent."""
        return (self.seen - self.expected) / math.sqrt(self.variance) if self.variance else 0.0


def repeats_beyond_chance(
    model: Any, message: dict[str, Any], others: list[int], temperature: float = 1.0
) -> Repeats:
    """message: an answer's, with its ids. others: what was drawn at the same places of another generation."""
    prompt, sampled = message["prompt_token_ids"], message["generation_token_ids"]
    compared = min(len(sampled), len(others))
    ids = torch.tensor([[*prompt, *sampled]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 :][:compared].float() / temperature
    chance = logits.softmax(-1).gather(1, torch.tensor(others[:compared])[:, None])[:, 0].double()
    seen = sum(a == b for a, b in zip(sampled, others, strict=False))
    return Repeats(compared, seen, chance.sum().item(), (chance * (1 - chance)).sum().item())
