"""Rows as TRL pads them, for the tests of packed ones. Needs no hypothesis, which a GPU machine may lack."""

from __future__ import annotations

import torch


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Returns ids, mask and T of rows of (prompt, completion)."""
    num_prompt, num_completion = (max(len(row[part]) for row in rows) for part in (0, 1))
    ids = torch.zeros(len(rows), num_prompt + num_completion, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, (prompt, completion) in enumerate(rows):
        own = slice(num_prompt - len(prompt), num_prompt + len(completion))
        ids[index, own], mask[index, own] = torch.tensor([*prompt, *completion]), 1
    return ids, mask, num_completion
