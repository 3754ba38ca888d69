"""Cutting padding and reordering rows change neither loss nor gradient."""

from __future__ import annotations

import pytest
import torch

from gymexp.training.padding import group_by_length, score_by_length, trim


def batch(rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Micro-batch in TRL's shape: prompts left-padded to 9, completions right-padded to 12."""
    prompts = torch.randint(1, 8, (rows,), generator=generator)
    completions = torch.randint(1, 12, (rows,), generator=generator)
    prompt_mask = (torch.arange(9) >= 9 - prompts[:, None]).int()
    completion_mask = (torch.arange(12) < completions[:, None]).int()
    return {
        "prompt_ids": torch.randint(1, 50, (rows, 9), generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(1, 50, (rows, 12), generator=generator) * completion_mask,
        "completion_mask": completion_mask,
        "tool_mask": torch.randint(0, 2, (rows, 12), generator=generator),
        "advantages": torch.randn(rows, generator=generator),
        "num_items_in_batch": torch.tensor(float(completion_mask.sum())),
    }


@pytest.mark.parametrize("seed", range(20))
def test_trimming_keeps_every_token_and_drops_every_column_of_padding(seed):
    inputs = batch(4, torch.Generator().manual_seed(seed))
    trimmed = trim(inputs)
    for kind in ("prompt", "completion"):
        mask = trimmed[f"{kind}_mask"]
        assert mask.sum() == inputs[f"{kind}_mask"].sum()
        assert trimmed[f"{kind}_ids"].shape == mask.shape
        assert mask.any(0).all(), "a column of padding is left"
        assert (
            trimmed[f"{kind}_ids"][mask.bool()] == inputs[f"{kind}_ids"][inputs[f"{kind}_mask"].bool()]
        ).all()
    assert trimmed["tool_mask"].shape == trimmed["completion_mask"].shape


def test_a_ratio_of_whole_sequences_is_left_alone():
    inputs = batch(4, torch.Generator().manual_seed(0)) | {"importance_sampling_ratio": torch.rand(4, 1)}
    assert trim(inputs)["importance_sampling_ratio"].shape == (4, 1)


@pytest.mark.parametrize("seed", range(20))
def test_grouping_keeps_every_row_whole_and_sorts_by_length(seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [batch(4, generator) for _ in range(3)]
    grouped = group_by_length(batches)
    assert [b["prompt_ids"].size(0) for b in grouped] == [4, 4, 4]

    def rows(some):
        return sorted(
            (tuple(p.tolist()), tuple(c.tolist()), tuple(t.tolist()), float(a))
            for b in some
            for p, c, t, a in zip(
                b["prompt_ids"], b["completion_ids"], b["tool_mask"], b["advantages"], strict=True
            )
        )

    assert rows(grouped) == rows(batches)
    lengths = [int(n) for b in grouped for n in b["prompt_mask"].sum(1) + b["completion_mask"].sum(1)]
    assert lengths == sorted(lengths)
    assert [b["num_items_in_batch"] for b in grouped] == [b["num_items_in_batch"] for b in batches]


@pytest.mark.parametrize("seed", range(10))
def test_scores_are_each_tokens_own_whatever_its_row_is_scored_with(seed):
    inputs = batch(7, torch.Generator().manual_seed(seed))
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    areas = []

    def score(ids, mask, num_completion):
        assert mask.any(0).all(), "a column of padding is left"
        areas.append(ids.numel())
        seen = torch.cumsum(ids * mask, 1).float()  # of a token and all before it
        return seen[:, -num_completion:]

    scores = score_by_length(score, ids, mask, 12, batch_size=2)
    wanted = torch.cumsum(ids * mask, 1)[:, -12:].float()
    there = inputs["completion_mask"].bool()
    assert torch.equal(scores[there], wanted[there])
    assert scores.shape == (7, 12) and len(areas) == 4
    assert sum(areas) < ids.numel()
