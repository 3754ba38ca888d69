"""The passes that give the log-probabilities of completions, with less padding than TRL's own, or with none
(`model.packing`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gymexp.training import packing, padding


class Scorer:
    """Stands for TRL's `_get_per_token_logps_and_entropies`, whose arguments and results it has."""

    def __init__(self, packs: str, trl_score: Callable[..., Any], autocast: Callable[..., Any]) -> None:
        """packs: `model.packing`. trl_score: TRL's own method. autocast: returns the
        context in which a pass computes."""
        self._packs = packs
        self._trl_score = trl_score
        self._autocast = autocast

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **options: Any,
    ) -> Any:
        has_options = any(value is not None and value is not False for value in options.values())
        if batch_size is None or compute_entropy or torch.is_grad_enabled() or has_options:
            return self.in_one_pass(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **options
            )

        def score(ids: torch.Tensor, mask: torch.Tensor, num_completion: int) -> torch.Tensor:
            return self.in_one_pass(model, ids, mask, num_completion)[0]

        order = None
        if self._packs == "tree":
            num_prompt = input_ids.size(1) - logits_to_keep
            order = packing.order_by_prompt(input_ids[:, :num_prompt], attention_mask[:, :num_prompt])
        scores = padding.score_by_length(score, input_ids, attention_mask, logits_to_keep, batch_size, order)
        return scores, None, None

    def in_one_pass(
        self,
        model: Any,
        ids: torch.Tensor,
        mask: torch.Tensor,
        num_completion: int,
        *args: Any,
        **options: Any,
    ) -> Any:
        """Scores all rows as one micro-batch."""
        if self._packs == "none":
            return self._trl_score(model, ids, mask, num_completion, *args, **options)
        with self._autocast():
            return *packing.score(model, ids, mask, num_completion, self._packs == "tree"), None
