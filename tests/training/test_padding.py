"""Cutting padding and reordering rows change neither loss nor gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gymexp.training.padding import effective_sample, group_by_length, may_regroup, score_by_length, trim


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


SAME_FOR_EACH_ROW = {
    "loss_type": "grpo",
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 4,
    "importance_sampling_level": "token",
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "top_entropy_quantile": 1.0,
}


@pytest.mark.parametrize(
    ("change", "may"),
    [
        *(({"loss_type": kind}, True) for kind in ("grpo", "dr_grpo", "dapo", "cispo")),
        *(({"loss_type": kind}, False) for kind in ("bnpo", "luspo", "sapo", "vespo")),
        ({"steps_per_generation": 2}, False),
        ({"steps_per_generation": 8}, False),
        ({"importance_sampling_level": "sequence"}, False),
        ({"entropy_coef": 0.01}, False),
        ({"use_adaptive_entropy": True}, False),
        ({"top_entropy_quantile": 0.8}, False),
    ],
)
def test_rows_change_micro_batches_only_where_the_objective_stays_the_same(change, may):
    """Which losses take a mean over a micro-batch's own tokens or rows stands in TRL's `_compute_loss`."""
    args = SimpleNamespace(**SAME_FOR_EACH_ROW | change)
    assert may_regroup(args, with_router_loss=False) is may  # type: ignore[arg-type]
    assert may_regroup(args, with_router_loss=True) is False  # type: ignore[arg-type]


def test_trimming_cuts_whatever_lies_over_the_completion_and_nothing_else():
    inputs = batch(4, torch.Generator().manual_seed(1))
    longest = int(inputs["completion_mask"].sum(1).max())
    assert longest < 12
    over = (
        "old_per_token_logps",
        "ref_per_token_logps",
        "sampling_per_token_logps",
        "importance_sampling_ratio",
        "tool_mask",
    )
    columns = torch.arange(12.0).repeat(4, 1)
    given = inputs | dict.fromkeys(over, columns) | {"other": columns, "ref_per_token_logps": None}
    trimmed = trim(given)
    assert trimmed.keys() == given.keys()
    for name in over:
        if name != "ref_per_token_logps":
            assert torch.equal(trimmed[name], columns[:, :longest]), name
    assert trimmed["ref_per_token_logps"] is None and torch.equal(trimmed["other"], columns)
    assert torch.equal(trimmed["advantages"], inputs["advantages"])
    assert given["tool_mask"].size(1) == 12, "the batch itself stays as it is"


def test_rows_without_a_token_keep_a_column():
    empty = {key: torch.zeros(2, 5, dtype=torch.int) for key in ("prompt_ids", "prompt_mask")}
    empty |= {key: torch.zeros(2, 3, dtype=torch.int) for key in ("completion_ids", "completion_mask")}
    trimmed = trim(empty)
    assert trimmed["prompt_ids"].shape == trimmed["completion_ids"].shape == (2, 1)


def test_one_micro_batch_has_nothing_to_be_grouped_with_and_rows_of_equal_length_stay_in_order():
    one = batch(4, torch.Generator().manual_seed(0))
    [same] = group_by_length([one])
    assert same is one
    alike = [
        {
            "prompt_ids": torch.tensor([[number], [number + 1]]),
            "prompt_mask": torch.ones(2, 1, dtype=torch.int),
            "completion_mask": torch.ones(2, 1, dtype=torch.int),
            "scalar": torch.tensor(float(number)),
            "text": "kept",
            "of_another_size": torch.zeros(3),
        }
        for number in (0, 2)
    ]
    grouped = group_by_length(alike)
    assert [b["prompt_ids"].flatten().tolist() for b in grouped] == [[0, 1], [2, 3]]
    assert [(b["scalar"].item(), b["text"], len(b["of_another_size"])) for b in grouped] == [
        (0.0, "kept", 3),
        (2.0, "kept", 3),
    ]


def test_where_all_is_padding_scores_are_zero_and_each_part_has_so_many_rows_at_most():
    ids = torch.tensor([[0, 0, 0, 5, 6, 0], [0, 1, 2, 3, 0, 0], [1, 2, 3, 4, 5, 6]])
    mask = (ids > 0).int()
    parts = []

    def score(ids, mask, num_completion):
        parts.append((len(ids), ids.size(1) - num_completion, num_completion))
        return ids[:, -num_completion:].float()

    scores = score_by_length(score, ids, mask, 3, batch_size=2)
    assert scores.tolist() == [[5, 6, 0], [3, 0, 0], [4, 5, 6]]
    assert parts == [(2, 2, 2), (1, 3, 3)], "the two shorter ones together, cut to the longer of them"


@pytest.mark.parametrize(
    ("weights", "mask", "wanted"),
    [
        ([[1.0, 2.0, 9.0]], [[1, 1, 0]], (3.0, 5.0, 2)),
        ([[1.0, 9.0], [3.0, 4.0]], [[1, 0], [1, 1]], (8.0, 26.0, 3)),
        ([[2.0], [3.0], [9.0]], [[1, 0], [0, 1], [0, 0]], (5.0, 13.0, 2)),  # of whole rollouts
        ([[2.0], [3.0]], [[1], [0]], (2.0, 4.0, 1)),  # completions of one token
    ],
)
def test_the_effective_sample_counts_what_is_trained_on(weights, mask, wanted):
    total, squares, number = effective_sample(torch.tensor(weights), torch.tensor(mask))
    assert (total.item(), squares.item(), number) == wanted
