"""An adapter that goes to vLLM as one: which other keys it leaves free."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gymexp.config.lora_rules import MAX_RANK, is_sent, problems_of_lora
from gymexp.config.rules import problems_of
from gymexp.config.schema import EngineConfig, LoraConfig, ModelConfig, RunConfig


def config_of(lora: dict[str, Any], **engine: Any) -> RunConfig:
    return RunConfig(model=ModelConfig("m", "p", lora=LoraConfig(**lora)), engine=EngineConfig(**engine))


def test_an_adapter_is_sent_as_one_if_there_is_one_and_it_is_asked_for():
    assert is_sent(LoraConfig(r=4, sync="adapter"))
    assert not is_sent(LoraConfig(r=4, sync="merged")) and not is_sent(LoraConfig())


@pytest.mark.parametrize(
    ("lora", "engine", "said"),
    [
        ({"r": 4, "sync": "both"}, {}, r"model\.lora\.sync must be one of merged, adapter, got 'both'"),
        ({"sync": "adapter"}, {}, r"model\.lora\.r must be the adapter's rank .* got None"),
        ({"r": 513}, {}, r"model\.lora\.r must be <= 512, vLLM's limit, .* got 513"),
        (
            {"r": 4},
            {"urls": ["http://a:1"]},
            r"model\.lora\.sync must be merged with engine\.urls, .* got 'adapter'",
        ),
        ({"r": 4}, {"weights": "nccl"}, r"engine\.weights must be auto or disk .* got 'nccl'"),
        ({"r": 4}, {"weights": "ipc"}, r"engine\.weights must be auto or disk .* got 'ipc'"),
        (
            {"r": 4},
            {"args": {"--api-server-count": 2}},
            r"engine\.args\.--api-server-count must be left out .* got 2",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_both_keys_and_goes_with_merged_weights(lora, engine, said):
    [problem] = problems_of_lora(config_of({"sync": "adapter"} | lora, **engine))
    assert re.search(said, problem)
    if "r" in lora:
        assert list(problems_of_lora(config_of(lora | {"sync": "merged"}, **engine))) == []


@pytest.mark.parametrize("r", [1, 8, MAX_RANK])
def test_other_ranks_and_a_file_are_fine(r):
    config = config_of({"r": r, "sync": "adapter"}, weights="disk", args={"api_server_count": 1})
    assert list(problems_of_lora(config)) == []


@pytest.mark.parametrize(
    "flag", ["enable_lora", "--max-lora-rank", "max_loras", "max_cpu_loras", "lora_modules", "lora_dtype"]
)
def test_vllms_own_flags_of_adapters_are_gymexps(flag):
    problems = [p for p in problems_of(config_of({}, args={flag: 1})) if "engine.args" in p]
    assert problems == [f"engine.args.{flag} is set by gymexp: use model.lora.sync instead"]
