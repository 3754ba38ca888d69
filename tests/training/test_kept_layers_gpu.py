"""Layers that are kept by the free memory of a GPU that other tensors nearly fill."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from gymexp.training import kept_layers, packing
from gymexp.training.kept_layers import GpuMemory, KeptLayers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NUM_LAYERS = 12
GIB = 2**30


def build_model() -> Any:
    gc.collect()
    torch.cuda.empty_cache()  # the memory of the test before
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
    )
    model = Qwen3ForCausalLM(config).cuda().train()
    model.set_attn_implementation("sdpa")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    packing.prepare(model)
    return model


def train_on(model: Any, lengths: tuple[int, int], packs: str) -> None:
    """A micro-batch of 8 rollouts of one task. lengths: of the prompt and of each completion."""
    draw = torch.Generator().manual_seed(sum(lengths))
    prompt = torch.randint(0, 32000, (1, lengths[0]), generator=draw).expand(8, -1)
    completions = torch.randint(0, 32000, (8, lengths[1]), generator=draw)
    ids = torch.cat([prompt, completions], dim=1).cuda()
    mask = torch.ones_like(ids)
    with torch.autocast("cuda", torch.bfloat16):
        if packs == "none":
            labels = ids.clone()
            labels[:, : lengths[0]] = -100
            output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            logprobs = output.log_probs[:, -lengths[1] :]
        else:
            logprobs, _ = packing.score(model, ids, mask, lengths[1], packs == "tree")
    logprobs.sum().backward()


STEPS = [
    [(200, 300), (200, 300)],
    [(400, 2000), (100, 500)],
    [(3000, 2500), (400, 2000), (3000, 2500)],
    [(100, 200), (3000, 2500)],
]


def train(model: Any, packs: str, kept: KeptLayers | None) -> tuple[list[float], torch.Tensor]:
    """Returns the share of layers that each micro-batch computed again, and the gradient of the last step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    shares = []
    for step in STEPS:
        optimizer.zero_grad()
        for lengths in step:
            train_on(model, lengths, packs)
            if kept and (share := kept.end()) is not None:
                shares.append(share)
        optimizer.step()
    return shares, torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


def checkpointed(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("packs", ["none", "varlen", "tree"])
def test_a_nearly_full_gpu_is_used_and_never_overfilled(monkeypatch, packs):
    """The room of the tests is what the longest micro-batch needs if all layers are computed again, and half
    of what the layers would need beside it. The share that stays unused is small, so that a wrong estimate
    shows as a peak above the room, or as an error of torch."""
    model = build_model()
    checkpointed(model)
    train(model, packs, None)  # what libraries need on first use
    model.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, expected = train(model, packs, None)
    all_again = torch.cuda.max_memory_allocated() - before
    model.gradient_checkpointing_disable()
    model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    train(model, packs, None)
    none_again = torch.cuda.max_memory_allocated() - before
    model.zero_grad()
    torch.cuda.empty_cache()
    monkeypatch.setattr(kept_layers, "_UNUSED_SHARE", 0.02)
    free, total = torch.cuda.mem_get_info()
    room = all_again + (none_again - all_again) // 2
    ballast = torch.empty(free - int(total * 0.02) - room, dtype=torch.uint8, device="cuda")
    checkpointed(model)
    kept = KeptLayers(model, GpuMemory())
    kept.install()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    peaks = []
    monkeypatch.setattr(
        GpuMemory, "peak", lambda self: peaks.append(torch.cuda.max_memory_allocated()) or peaks[-1]
    )
    shares, gradient = train(model, packs, kept)
    print(
        f"{packs}: {all_again / GIB:.1f} to {none_again / GIB:.1f} GiB, room {room / GIB:.1f}, peaks",
        [round((peak - start) / GIB, 1) for peak in peaks],
        "again",
        [round(share, 2) for share in shares],
    )
    assert max(peaks) - start <= room
    assert shares[0] == pytest.approx(1 - 1 / NUM_LAYERS)
    assert shares[1] == shares[-2] == 0.0  # short rows: all of them fit
    assert 0 < shares[-1] < 0.9  # long ones
    assert (gradient - expected).norm() / expected.norm() < 1e-2  # sums of bfloat16 in another order
    del ballast


def test_rows_of_any_length_fit_though_the_allocator_leaves_gaps(monkeypatch):
    """A GPU of 40 GiB, most of which long rows need, with lengths that change in every micro-batch."""
    size = 40 * GIB
    model = build_model()
    checkpointed(model)
    free, total = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of free memory")
    ballast = torch.empty(free - size, dtype=torch.uint8, device="cuda")
    monkeypatch.setattr(kept_layers, "_UNUSED_SHARE", kept_layers._UNUSED_SHARE * size / total)
    kept = KeptLayers(model, GpuMemory())
    kept.install()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    draw = random.Random(0)
    shares, gaps = [], []
    for _ in range(15):
        optimizer.zero_grad()
        for _ in range(4):
            packs = draw.choice(["none", "varlen", "tree"])
            train_on(model, (draw.randrange(50, 4000), draw.randrange(50, 4000)), packs)
            shares.append(kept.end())
            gaps.append((torch.cuda.max_memory_reserved() - torch.cuda.max_memory_allocated()) / GIB)
        optimizer.step()
    retries = torch.cuda.memory_stats()["num_alloc_retries"]
    print(
        f"computed again {[round(share, 2) for share in shares]}, retries {retries}, gaps {max(gaps):.1f} GiB"
    )
    assert min(shares) == 0.0 < max(shares[1:]), "short rows need no second computation, and long ones do"
    del ballast
