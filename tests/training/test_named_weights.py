"""Names and places of the weights that others get."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gymexp.config.schema import ModelConfig
from gymexp.training import named_weights


def sent(model: torch.nn.Module, device: str) -> list[tuple[str, torch.Tensor]]:
    accelerator = SimpleNamespace(device=torch.device(device))
    gathering = SimpleNamespace(gather_params=lambda _: nullcontext())
    trainer: Any = SimpleNamespace(model=model, accelerator=accelerator, _dist=gathering)
    return list(named_weights.whole(trainer, ModelConfig("m", "p", dtype="bfloat16")))


def test_weights_have_their_names_in_files_whatever_wraps_the_layers():
    """FSDP2's activation checkpointing wraps them, as here."""
    model = torch.nn.Sequential(checkpoint_wrapper(torch.nn.Linear(2, 3)))
    weights = sent(model, "cpu")
    assert [name for name, _ in weights] == ["0.weight", "0.bias"]
    assert {tensor.dtype for _, tensor in weights} == {torch.bfloat16}


def test_weights_that_are_elsewhere_go_to_the_accelerator():
    assert {tensor.device.type for _, tensor in sent(torch.nn.Linear(2, 3), "meta")} == {"meta"}
