"""Layers that are compiled for packs: few compilations, and the values of padded rows without any."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DynamoBackend
from padded_rows import distance, padded
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from small_trainer import MadeUp, build_trainer, save_policy
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from gymexp.config.packing import Compilation
from gymexp.config.schema import LoraConfig
from gymexp.training import packing
from gymexp.training.compiled_layers import compile_layers
from gymexp.training.packing_rules import MODEL_TYPES

GRAPHS = Compilation("eager", None)  # the graphs of the forward pass, computed by torch's own operators
TRACED = Compilation("aot_eager", None)  # those of the backward pass too, which inductor turns into kernels
INDUCTOR = Compilation("inductor", None)
Rows = list[tuple[list[int], list[int]]]
needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") or " " in torch.__file__,
    reason="on a CPU inductor needs a C++ compiler, and a torch in a path without spaces",
)


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model_of(kind: str = "qwen3", num_layers: int = 2, lora: bool = False) -> Any:
    """A model in training, and with an adapter whose product is not zero if `lora`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.4,
        max_position_embeddings=256,
        pad_token_id=0,
        **({"sliding_window": None} if kind == "mistral" else {}),
    )
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    if lora:
        model = get_peft_model(
            model, PeftConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0)
        )
        model.enable_input_require_grads()
    return model.train()


def compiled(model: Any, compilation: Compilation = TRACED) -> Any:
    packing.prepare(model)
    compile_layers(model, compilation)
    return model


def some_rows(seed: int, count: int = 7) -> Rows:
    draw = random.Random(seed)
    prompts = [[draw.randrange(1, 64) for _ in range(size)] for size in (1, 9, 20)]
    return [
        (draw.choice(prompts), [draw.randrange(1, 64) for _ in range(draw.randrange(1, 15))])
        for _ in range(count)
    ]


def values_of(model: Any, rows: Rows, shares: bool | None) -> list[torch.Tensor]:
    """Log-probabilities, entropies and the gradient of a sum of both. shares: None for padded rows."""
    ids, mask, width = padded(rows)
    trained = mask[:, -width:].bool()
    if shares is None:
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-width] = -100
        output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        logprobs, entropies = output.log_probs[:, -width:], output.entropy[:, -width:]
    else:
        logprobs, entropies = packing.score(model, ids, mask, width, shares)
    weights = torch.randn(trained.shape, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    (weights * logprobs + 0.1 * entropies)[trained].sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return [logprobs[trained].detach(), entropies[trained].detach(), gradient]


def differ(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(distance(ours, theirs) for ours, theirs in zip(one, other, strict=True))


CASES = [
    *((kind, TRACED, {}, False) for kind in MODEL_TYPES),
    ("qwen3", TRACED, {"use_reentrant": False}, False),
    ("qwen3", TRACED, {"use_reentrant": True}, False),
    ("qwen3", TRACED, {}, True),
    pytest.param("qwen3", INDUCTOR, {}, False, marks=needs_compiler),
    pytest.param("qwen3", INDUCTOR, {"use_reentrant": False}, True, marks=needs_compiler),
]


@pytest.mark.grid
@pytest.mark.parametrize(("kind", "compilation", "checkpointing", "lora"), CASES)
def test_compiled_layers_give_the_values_of_padded_rows(kind, compilation, checkpointing, lora):
    plain, model = (model_of(kind, lora=lora) for _ in range(2))
    compiled(model, compilation)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    for seed in (1, 2):
        rows = some_rows(seed)
        expected = values_of(plain, rows, None)
        assert differ(values_of(model, rows, shares=False), expected) < 1e-5
        assert differ(values_of(model, rows, shares=True), expected) < 1e-5
    assert counters["stats"]["unique_graphs"] > 0


def test_a_token_more_or_a_rollout_fewer_compiles_nothing_and_neither_does_a_layer_more():
    numbers, graphs = set(), []
    for num_layers in (2, 5):
        torch._dynamo.reset()
        counters.clear()
        model = compiled(model_of(num_layers=num_layers), GRAPHS)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        values_of(model, [([1, 2, 3], [4, 5, 6, 7, 8])], True)  # as many tokens as a head has numbers
        graphs.append(counters["stats"]["unique_graphs"])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(12):
                rows = some_rows(seed, count=1 + seed % 7)
                numbers.add(sum(len(prompt) + len(completion) for prompt, completion in rows))
                values_of(model, rows, shares=seed % 2 == 0)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(numbers) > 8
    assert graphs == [4] * 4, "before and after the attention, in the layer and in its attention module"


def test_only_packs_are_compiled_so_that_the_engine_samples_as_before():
    model = compiled(model_of(), GRAPHS)
    model.eval()
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    values_of(model.train(), some_rows(0), None)
    assert counters["stats"]["unique_graphs"] == 0
    values_of(model, some_rows(0), shares=True)
    assert counters["stats"]["unique_graphs"] == 4


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """Two layers: `every_n_layers` has a choice."""
    return save_policy(tmp_path_factory.mktemp("policy"), num_layers=2)


EVERY_SECOND = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}
OFTEN: dict[str, Any] = {"correction": "decoupled", "beta": 0.1, "num_iterations": 2, "max_steps": 4}


@pytest.mark.grid
@pytest.mark.parametrize(
    ("packs", "settings", "backend", "most"),
    [
        ("varlen", {}, "aot_eager", 4),
        ("tree", EVERY_SECOND, "aot_eager", 4),
        ("varlen", OFTEN, "eager", 9),
        ("tree", OFTEN | EVERY_SECOND | {"lora": LoraConfig(r=4)}, "eager", 14),
    ],
    ids=["plain", "checkpointing", "reference", "adapter"],
)
def test_training_with_compiled_layers_ends_with_the_same_weights_under_the_same_names(
    policy, tmp_path, packs, settings, backend, most
):
    """most: graphs of passes with and without gradients, of the reference, and of a model without adapter."""
    ends: list[dict[str, torch.Tensor]] = []
    for compiles in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        torch.manual_seed(0)  # the adapter's first weights
        changes = {"max_steps": 2, "learning_rate": 0.01} | settings | compiles
        trainer = build_trainer(policy, tmp_path, MadeUp(own_logprobs=True), packing=packs, **changes)
        before = {name: weight.clone() for name, weight in trainer.named_weights()}
        trainer.train_from(None)
        ends.append(dict(trainer.named_weights()))
        assert not any("_orig_mod" in name for name in trainer.accelerator.get_state_dict(trainer.model))
    assert trainer.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO, "not the whole model"
    assert 0 < counters["stats"]["unique_graphs"] <= most
    plain, ours = ends
    assert [*ours] == [*plain] == [*before]
    for name, weight in plain.items():
        assert distance(ours[name], weight) < 1e-5
    assert max((before[name] - weight).abs().max() for name, weight in plain.items()) > 1e-3
