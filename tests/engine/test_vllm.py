"""vLLM's command line, and what its log says."""

import json
import sys

import pytest

from gymexp.cluster.placement import Placement, Share, transfer_of
from gymexp.config.schema import EngineConfig, ModelConfig, RunConfig
from gymexp.engine.vllm import Version, count_api_servers, explain, read_version, serve_command
from gymexp.errors import ConfigError

MODEL = ModelConfig(name="tiny", path="gymexp/assets/tiny", dtype="float32", max_model_len=2048)


def flags(command: list[str]) -> dict[str, str | None]:
    """Flag -> the value that follows it."""
    names = [i for i, word in enumerate(command) if word.startswith("--")]
    return {
        command[i]: command[i + 1] if i + 1 < len(command) and i + 1 not in names else None for i in names
    }


def test_a_replica_serves_the_policy_on_loopback_with_the_log_probabilities_of_what_was_sampled():
    command = serve_command(MODEL, EngineConfig(tensor_parallel_size=2), 4000, Version(0, 26), "nccl")
    assert command[1:4] == ["-m", "gymexp_serve", "serve"]
    assert command[4].endswith("gymexp/assets/tiny")
    said = flags(command)
    assert said["--host"] == "127.0.0.1" and said["--port"] == "4000"
    assert said["--tensor-parallel-size"] == "2" and said["--max-model-len"] == "2048"
    assert said["--logprobs-mode"] == "processed_logprobs" and said["--generation-config"] == "vllm"
    assert json.loads(said["--weight-transfer-config"] or "") == {"backend": "nccl"}
    assert "--enable-scale-out" not in said


def test_on_a_gpu_that_trains_too_a_replica_takes_a_part_of_its_memory_and_can_sleep():
    said = flags(serve_command(MODEL, EngineConfig(), 4000, Version(0, 26), "ipc", shared=True))
    assert "--enable-sleep-mode" in said and float(said["--gpu-memory-utilization"] or 1) < 1
    assert json.loads(said["--weight-transfer-config"] or "") == {"backend": "ipc"}


def test_a_large_machine_has_several_processes_take_requests():
    counts = [
        count_api_servers(cores, replicas) for cores, replicas in ((2, 1), (16, 1), (32, 1), (32, 2), (4, 8))
    ]
    assert counts == [1, 2, 4, 2, 1]
    said = flags(serve_command(MODEL, EngineConfig(), 4000, Version(0, 26), "nccl", num_api_servers=4))
    assert said["--api-server-count"] == "4"
    assert "--api-server-count" not in serve_command(MODEL, EngineConfig(), 4000, Version(0, 26), "nccl")


def test_the_newer_ones_are_told_to_open_the_token_routes():
    command = serve_command(MODEL, EngineConfig(), 4000, Version(0, 31), "disk")
    assert "--enable-scale-out" in command and "--weight-transfer-config" not in command


def test_further_flags_go_through_and_win():
    engine = EngineConfig(
        args={
            "gpu_memory_utilization": 0.4,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "compilation_config": {"level": 0},
            "max_num_seqs": None,
        }
    )
    said = flags(serve_command(MODEL, engine, 1, Version(0, 31), "disk"))
    assert said["--gpu-memory-utilization"] == "0.4" and said["--enforce-eager"] is None
    assert "--no-enable-prefix-caching" in said and "--max-num-seqs" not in said
    assert said["--compilation-config"] == '{"level": 0}'


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        (
            "ValueError: Free memory on device cuda:0 (10.0/139.8 GiB) on startup is less than desired GPU "
            "memory utilization (0.9, 125.8 GiB).",
            "in use by another program",
        ),
        ("ValueError: No available memory for the cache blocks.", "smaller model.max_model_len"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "does not fit"),
        (
            "OSError: nobody/none is not a local folder and is not a valid model identifier",
            "model.path was not",
        ),
        ("vllm: error: unrecognized arguments: --no-such-flag", "engine.args has a flag"),
        ("ImportError: cannot import name 'NamespaceTool' from 'openai.types'", "engine.python"),
    ],
)
def test_a_known_failure_is_told_with_what_to_do_and_vllms_own_line(tmp_path, line, advice):
    log = tmp_path / "vllm.log"
    log.write_text(f"INFO loading\n{line}\nINFO bye\n")
    assert advice in explain(log) and line[-100:] in explain(log)


def test_an_unknown_failure_gets_no_advice(tmp_path):
    (tmp_path / "vllm.log").write_text("Segmentation fault\n")
    assert explain(tmp_path / "vllm.log") == explain(tmp_path / "none.log") == ""


def python_that_says(tmp_path, text: str, code: int = 0) -> EngineConfig:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\necho {text}\nexit {code}\n")
    path.chmod(0o755)
    return EngineConfig(python=str(path))


def test_the_version_that_an_interpreter_has_is_checked(tmp_path):
    assert read_version(python_that_says(tmp_path, "0.31.0+cpu")) == (0, 31, True)
    with pytest.raises(ConfigError, match=r"needs vLLM 0\.26 to 0\.31, .* has 0\.9\.1"):
        read_version(python_that_says(tmp_path, "0.9.1"))
    with pytest.raises(ConfigError, match=r"has none: install it there"):
        read_version(python_that_says(tmp_path, "", code=1))
    with pytest.raises(ConfigError, match=r"engine\.python=.* cannot be run"):
        read_version(EngineConfig(python=str(tmp_path / "gone")))


def test_on_a_cpu_no_prompt_is_cut_in_chunks_whatever_is_asked_for(tmp_path):
    """At a chunk of a seeded request, vLLM 0.31 on a CPU ends: RuntimeError: CPU Generator does not use
    offset."""
    on_cpu = serve_command(MODEL, EngineConfig(), 4000, Version(0, 31, is_cpu=True), "disk")
    assert "--no-enable-chunked-prefill" in on_cpu
    on_gpu = serve_command(MODEL, EngineConfig(), 4000, Version(0, 31), "nccl")
    assert not any("chunked" in flag for flag in on_gpu)
    engine = python_that_says(tmp_path, "0.31.0+cpu")
    engine.args["enable_chunked_prefill"] = True
    with pytest.raises(ConfigError, match=r"engine\.args\.enable_chunked_prefill must be false"):
        read_version(engine)
    engine = python_that_says(tmp_path, "0.31.0")
    engine.args["enable_chunked_prefill"] = True
    assert read_version(engine) == (0, 31, False)


def test_weights_go_by_nccl_between_gpus_of_their_own_and_by_ipc_within_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    apart = Placement("vllm", [Share(0, ["1"])], [Share(0, ["0"])])
    assert transfer_of(RunConfig(engine=EngineConfig(weights="nccl")), apart) == "nccl"
    assert transfer_of(RunConfig(engine=EngineConfig(weights="disk")), apart) == "disk"
    assert transfer_of(RunConfig(), Placement("vllm", [Share(0, ["0"])], [Share(0, ["0"])])) == "ipc"
    assert transfer_of(RunConfig(), Placement("vllm", [Share(0, [])], [Share(0, [])])) == "disk"
