"""Packed rows on a GPU: FlashAttention's kernel, with its causal mask from the end of the keys."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from padded_rows import distance, padded
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from gymexp.config.packing import Compilation
from gymexp.training import packing
from gymexp.training.compiled_layers import compile_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def build_model() -> Any:
    """Grouped heads of Qwen3's size; weights so large that a wrong mask shows in every log-probability."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        initializer_range=0.1,
    )
    model = Qwen3ForCausalLM(config).cuda().train()
    model.set_attn_implementation("sdpa")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


def rows() -> list[tuple[list[int], list[int]]]:
    """Groups of prompts of 1, 300 and 777 tokens, with completions of 1 to 500."""
    draw = random.Random(0)
    prompts = [[draw.randrange(512) for _ in range(size)] for size in (1, 300, 777)]
    return [(p, [draw.randrange(512) for _ in range(size)]) for p in prompts for size in (1, 63, 130, 500)]


def measure(
    model: Any, packs: str, dtype: torch.dtype, checkpoints: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-probabilities of the completions, and the gradient of their weighted sum."""
    ids, mask, width = (x.cuda() if isinstance(x, torch.Tensor) else x for x in padded(rows()))
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-width] = -100
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        if packs == "none":
            output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            logprobs = output.log_probs[:, -width:]
        else:
            logprobs, _ = packing.score(model, ids, mask, width, packs == "tree")
    trained = mask[:, -width:].bool()
    weights = torch.randn(trained.shape, generator=torch.Generator().manual_seed(1)).cuda()
    model.zero_grad()
    (logprobs * weights)[trained].sum().backward()
    model.gradient_checkpointing_disable()
    return logprobs[trained].detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("packs", ["varlen", "tree"])
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_packed_rows_have_the_values_of_padded_ones(packs, checkpoints, compiles):
    """In bfloat16 both differ from float32 by rounding: the packed ones by no more than the padded ones."""
    model = build_model()
    exact = measure(model, "none", torch.float32, False)
    rounded = measure(model, "none", torch.bfloat16, checkpoints)
    packing.prepare(model)
    if compiles:
        compile_layers(model, Compilation("inductor", None))
    for ours, theirs in zip(measure(model, packs, torch.float32, checkpoints), exact, strict=True):
        assert distance(ours, theirs) < 1e-4
    for ours, padded_values, theirs in zip(
        measure(model, packs, torch.bfloat16, checkpoints), rounded, exact, strict=True
    ):
        assert distance(ours, theirs) < 1.5 * distance(padded_values, theirs) < 0.1
