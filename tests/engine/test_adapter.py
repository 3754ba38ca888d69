"""What of an adapter is known before a vLLM is started."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket

import pytest

from gymexp.cluster.placement import Placement, Share
from gymexp.config.schema import EngineConfig, LoraConfig, ModelConfig, RunConfig
from gymexp.engine.adapter import check, max_rank, name_of
from gymexp.engine.vllm import Version, environment, explain, serve_command
from gymexp.errors import ConfigError
from gymexp.processes.access_keys import Keys
from gymexp.record.directory import RunDirectory
from gymexp.run import services
from gymexp.run.train import _fit_to_model
from gymexp.run.work import TRAINING, evaluation


def model(**lora) -> ModelConfig:
    return ModelConfig("tiny", "gymexp/assets/tiny", lora=LoraConfig(**{"r": 4, "sync": "adapter"} | lora))


def test_the_rank_is_the_next_one_that_vllm_takes():
    """vLLM 0.31's MaxLoRARanks: 1, 8, 16, 32, 64, 128, 256, 320, 512."""
    ranks = {1: 8, 8: 8, 9: 16, 33: 64, 257: 320, 321: 512, 512: 512}
    assert {r: max_rank(r) for r in ranks} == ranks


def test_each_version_has_a_name_and_none_is_that_of_the_model_alone():
    names = [name_of(version) for version in range(3)]
    assert len({*names, "policy"}) == 4, "vLLM serves the model itself as `policy`"


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"model_type": "qwen3"}, False),
        ({"model_type": "llama"}, False),
        ({"model_type": "gpt2"}, True),  # its layers are Conv1D
        ({"model_type": "olmo2"}, True),  # vLLM has it by transformers
        ({}, True),
    ],
)
def test_models_whose_layers_vllm_does_not_know_by_name_are_refused_and_merged_ones_never(
    tmp_path, config, refused
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(model(sync="merged"), tmp_path, "vllm", on_gpu=False)
    check(model(), tmp_path, "hf", on_gpu=True)  # it samples from the trainer's own model
    if not refused:
        return check(model(), tmp_path, "vllm", on_gpu=False)
    kind = config.get("model_type")
    with pytest.raises(ConfigError, match=rf"model\.lora\.sync must be merged .* {kind}.* got 'adapter'"):
        check(model(), tmp_path, "vllm", on_gpu=False)


def test_a_layer_that_vllm_would_not_find_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    for targets in ("all-linear", r".*_proj", ["q_proj", "model.layers.3.mlp.up_proj"]):
        check(model(target_modules=targets), tmp_path, "vllm", on_gpu=False)
    for target in ("q_prj", "embed_tokens", "lm_head"):
        with pytest.raises(ConfigError, match=rf"model\.lora\.target_modules must name .* got '{target}'"):
            check(model(target_modules=["q_proj", target]), tmp_path, "vllm", on_gpu=False)


def test_float32_is_refused_where_vllm_has_no_kernels_for_it(tmp_path):
    """vllm/lora/ops/triton_ops/lora_shrink_op.py asserts float16 or bfloat16; on a CPU torch computes."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    precise = dataclasses.replace(model(), dtype="float32")
    check(precise, tmp_path, "vllm", on_gpu=False)
    check(dataclasses.replace(precise, lora=LoraConfig(r=4, sync="merged")), tmp_path, "vllm", on_gpu=True)
    check(dataclasses.replace(precise, dtype="bfloat16"), tmp_path, "vllm", on_gpu=True)
    with pytest.raises(ConfigError, match=r"model\.dtype must be bfloat16 or float16 .* got 'float32'"):
        check(precise, tmp_path, "vllm", on_gpu=True)


@pytest.mark.parametrize("gpus", [["0", "1"], []])
def test_a_run_knows_whether_its_vllm_has_a_gpu(tmp_path, gpus):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    precise = dataclasses.replace(model(), dtype="float32", packing="none")
    config, placement = RunConfig(model=precise), Placement("vllm", [Share(0, gpus)], [])
    if not gpus:
        assert _fit_to_model(config, tmp_path, placement, print) == config
        return
    with pytest.raises(ConfigError, match=r"model\.dtype must be bfloat16 or float16"):
        _fit_to_model(config, tmp_path, placement, print)


def test_vllm_is_started_with_room_for_one_adapter_and_one_api_server():
    command = serve_command(model(r=12), EngineConfig(), 4000, Version(0, 31), "adapter", num_api_servers=4)
    flags = dict(zip(command, [*command[1:], ""], strict=True))
    assert flags["--max-lora-rank"] == "16" and flags["--max-loras"] == "1" and "--enable-lora" in flags
    assert "--api-server-count" not in flags, "vLLM refuses to load adapters with more than one"
    assert "--weight-transfer-config" not in flags
    merged = serve_command(model(), EngineConfig(), 4000, Version(0, 31), "disk")
    assert not [flag for flag in merged if "lora" in flag]


def test_a_name_that_vllm_does_not_know_is_never_taken_for_the_models(monkeypatch):
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    assert environment("adapter")["VLLM_SKIP_MODEL_NAME_VALIDATION"] == "0"
    assert environment("adapter")["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert environment("disk")["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"


def test_a_model_that_this_vllm_has_no_adapters_for_is_told_with_what_to_do(tmp_path):
    (tmp_path / "log").write_text("ValueError: GPT2LMHeadModel does not support LoRA yet.\n")
    assert "set model.lora.sync=merged" in explain(tmp_path / "log")


@pytest.mark.parametrize(
    ("engine", "sync", "work", "names_it"),
    [
        ("vllm", "adapter", TRAINING, True),
        ("vllm", "merged", TRAINING, False),
        ("hf", "adapter", TRAINING, False),  # in the trainer, where the adapter is in the model
        ("vllm", "adapter", evaluation([0]), False),  # of a whole model
    ],
)
def test_the_gateway_names_the_adapter_where_one_is_sent(tmp_path, monkeypatch, engine, sync, work, names_it):
    started: list[list[str]] = []

    async def note(command, *_, **__):
        started.append(command)

    monkeypatch.setattr(services, "spawn", note)
    placement = Placement(engine, [Share(0, [])], [Share(0, [])] * (engine == "vllm"))
    config, directory = RunConfig(model=model(sync=sync)), RunDirectory(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        [gateway] = services.gateways(config, placement, directory, [sock], ["http://e"], Keys.new(), work)
        asyncio.run(gateway.start())
    assert ("--adapter" in started[0]) == names_it
    assert not names_it or "--hold" in started[0]
