"""`model.packing` beside the keys that it does not go with."""

from __future__ import annotations

import pytest

from gymexp.config.packing import Compilation, compilation_of, problems_of_packing
from gymexp.config.schema import EnvConfig, ModelConfig, RunConfig


@pytest.mark.parametrize(
    ("model", "trainer", "problem"),
    [
        ({"packing": "tree"}, {}, None),
        ({"packing": "none", "attn_implementation": "eager"}, {"torch_compile": True}, None),
        ({"attn_implementation": "eager"}, {"torch_compile": True}, None),  # auto is none then
        ({"packing": "packed"}, {}, "model.packing must be one of auto, none, varlen, tree, got 'packed'"),
        (
            {"packing": "varlen", "attn_implementation": "flash_attention_2"},
            {},
            "model.attn_implementation must be sdpa with model.packing=varlen",
        ),
        ({"packing": "tree"}, {"torch_compile": True}, None),
        ({"packing": "tree"}, {"torch_compile_mode": "max-autotune-no-cudagraphs"}, None),
        ({}, {"torch_compile_mode": "max-autotune", "deepspeed": {"zero_optimization": {"stage": 3}}}, None),
        (
            {"packing": "tree"},
            {"torch_compile_backend": "tvm"},
            "trainer.torch_compile_backend must be one of inductor, aot_eager, eager with "
            "model.packing=tree, as no other was compared with padded rows, got 'tvm'",
        ),
        (
            {"packing": "varlen"},
            {"torch_compile_mode": "reduce-overhead"},
            "trainer.torch_compile_mode must be one of default, max-autotune-no-cudagraphs with "
            "model.packing=varlen, as the others record a CUDA graph for each number of tokens, got 'reduce-",
        ),
        (
            {"packing": "tree"},
            {"torch_compile_backend": "inductor", "deepspeed": {"zero_optimization": {"stage": 3}}},
            "trainer.torch_compile must be false with model.packing=tree and trainer.deepspeed",
        ),
        ({"packing": "tree"}, {"use_liger_kernel": True}, "trainer.use_liger_kernel must be false with"),
    ],
)
def test_what_does_not_go_with_packs_is_refused_by_name(model, trainer, problem):
    config = RunConfig(model=ModelConfig("m", "p", **model), env={"e": EnvConfig("c", "a")}, trainer=trainer)
    problems = list(problems_of_packing(config))
    assert len(problems) == (problem is not None)
    assert problem is None or problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("packs", "trainer", "expected"),
    [
        ("tree", {"torch_compile": True}, Compilation("inductor", None)),
        ("tree", {"torch_compile_mode": "default"}, Compilation("inductor", "default")),
        (
            "varlen",
            {"torch_compile": False, "torch_compile_backend": "eager"},
            Compilation("eager", None),
        ),
        ("tree", {"torch_compile": False}, None),
        ("none", {"torch_compile": True}, None),
        ("auto", {"torch_compile": True}, None),
    ],
)
def test_layers_are_compiled_where_transformers_would_compile_the_model(packs, trainer, expected):
    """transformers compiles if any of the three arguments says so, and with inductor by default."""
    config = RunConfig(
        model=ModelConfig("m", "p", packing=packs), env={"e": EnvConfig("c", "a")}, trainer=trainer
    )
    assert compilation_of(config) == expected
