"""`model.packing` beside the keys that it does not go with."""

from __future__ import annotations

import pytest

from gymexp.config.packing import problems_of_packing
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
        (
            {"packing": "tree"},
            {"torch_compile": True},
            "trainer.torch_compile must be false with model.packing=tree",
        ),
        ({"packing": "tree"}, {"use_liger_kernel": True}, "trainer.use_liger_kernel must be false with"),
    ],
)
def test_what_does_not_go_with_packs_is_refused_by_name(model, trainer, problem):
    config = RunConfig(model=ModelConfig("m", "p", **model), env={"e": EnvConfig("c", "a")}, trainer=trainer)
    problems = list(problems_of_packing(config))
    assert len(problems) == (problem is not None)
    assert problem is None or problems[0].startswith(problem)
