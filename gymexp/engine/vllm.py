"""vLLM as the engine: the `vllm serve` command of a replica, and what its log says when it cannot start.

gymexp runs vLLM as it is published. The routes it needs beyond chat completions (token ids in and out, pause,
weight transfer) are vLLM's own, behind VLLM_SERVER_DEV_MODE=1 and, from 0.30, --enable-scale-out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from gymexp.config.schema import EngineConfig, ModelConfig
from gymexp.errors import ConfigError
from gymexp.policy.snapshot import directory_of

IN_VLLM = Path(__file__).resolve().parent / "in_vllm"
OLDEST, NEWEST = (0, 26), (0, 31)  # what TRL 1.16 takes, from the first with these routes
SHARED_GPU_MEMORY = 0.5  # of a GPU that trains as well; vLLM gives it back while it sleeps

# What a log says, and what to do about it; the first that is found is told.
_CAUSES = (
    (
        r"Free memory on device .* is less than desired GPU memory utilization",
        "the GPU is in use by another program: end that program, leave the GPU out of "
        "CUDA_VISIBLE_DEVICES, or say engine.args.gpu_memory_utilization=… with a smaller share",
    ),
    (
        r"No available memory for the cache blocks|larger than the available KV cache memory"
        r"|Available KV cache memory: -",
        "the model leaves too little GPU memory for keys and values: say a smaller model.max_model_len, "
        "a larger engine.args.gpu_memory_utilization, or engine.tensor_parallel_size=2",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError",
        "the model does not fit into the GPU's memory: say engine.tensor_parallel_size=2, or a smaller model",
    ),
    (
        r"is not a local folder and is not a valid model identifier|Repo id must be in the form"
        r"|Repository Not Found|LocalEntryNotFoundError|couldn't connect to 'https://huggingface\.co'",
        "model.path was not found: it must be a directory, or a hub id that this machine can reach",
    ),
    (
        r"unrecognized arguments: (.*)",
        "engine.args holds a flag that this `vllm serve` does not know",
    ),
    (
        r"cannot import name 'NamespaceTool'|No module named 'openai",
        "the openai package beside vLLM is too old for it (NeMo Gym's, perhaps): give vLLM an environment "
        "of its own and name its interpreter in engine.python",
    ),
    (
        r"No module named 'ray'",
        "this vLLM's CUDA IPC imports ray: install ray beside it, or say engine.weights=disk",
    ),
    (r"No CUDA GPUs are available|NVIDIA driver .* too old", "vLLM finds no GPU that it can use"),
)


class Version(NamedTuple):
    """Of an installed vLLM."""

    major: int
    minor: int
    is_cpu: bool = False  # a build without CUDA


def read_version(engine: EngineConfig) -> Version:
    """Of the interpreter's vLLM. Raises ConfigError if it has none, or one that does not fit."""
    python = engine.python or sys.executable
    code = "import importlib.metadata as m; print(m.version('vllm'))"
    try:
        shown = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    except OSError as error:
        raise ConfigError(f"engine.python={python} cannot be run: {error.strerror}") from None
    found = re.match(r"(\d+)\.(\d+)", shown.stdout.strip())
    if shown.returncode or not found:
        raise ConfigError(
            f"engine=vllm needs vLLM, and {python} has none: install it there (in a checkout of gymexp: "
            "pip install -e '.[vllm]'), or name an interpreter that has it in engine.python"
        )
    version = Version(int(found[1]), int(found[2]), "+cpu" in shown.stdout)
    if not OLDEST <= version[:2] <= NEWEST:
        raise ConfigError(
            f"engine=vllm needs vLLM {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, {python} has "
            f"{shown.stdout.strip()}"
        )
    if version.is_cpu and engine.args.get("enable_chunked_prefill"):
        # For a chunk that is not a prompt's last it sets a seeded request's generator back, which torch's
        # generator of a CPU has no way to do: the engine ends (seen in 0.31, gpu_model_runner.py).
        raise ConfigError(
            "engine.args.enable_chunked_prefill must be false with a vLLM on a CPU, which ends at the first "
            "prompt that is cut in chunks if requests have seeds, as all have here: leave it out"
        )
    return version


def environment(transfer: str) -> dict[str, str]:
    """What a replica needs around it. transfer: how weights reach it, nccl, ipc or disk.

    Each of these takes routes of the development mode: /pause, /resume and /reset_prefix_cache for all,
    /collective_rpc for disk, those of weight transfer for nccl and ipc. Only ipc has something unpickled,
    handles to GPU memory, which runs code of whoever sends it. So every path takes the engine's key
    (`in_vllm/gymexp_key.py`), as vLLM's own guards none of these.
    """
    set_ = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    set_["PYTHONPATH"] = os.pathsep.join(filter(None, (str(IN_VLLM), os.environ.get("PYTHONPATH"))))
    set_["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1" if transfer == "ipc" else "0"
    set_["VLLM_API_KEY"] = ""  # of the user's other servers: one that vLLM demands as well
    return set_


def serve_command(
    model: ModelConfig,
    engine: EngineConfig,
    port: int,
    version: Version,
    transfer: str,
    shared: bool = False,
    num_api_servers: int = 1,
    host: str = "127.0.0.1",
) -> list[str]:
    """`vllm serve` for one replica. transfer: how weights reach it, nccl, ipc or disk.

    shared: its GPU trains as well. num_api_servers: processes that take requests, see `count_api_servers`.
    host: the address that it listens on.
    """
    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "served_model_name": "policy",
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "tensor_parallel_size": engine.tensor_parallel_size,
        # Of the distribution that was sampled from: what the trainer's ratios need.
        "logprobs_mode": "processed_logprobs",
        # The model's own generation_config.json would change the sampling behind the trainer's back.
        "generation_config": "vllm",
        "middleware": "gymexp_key.DemandsKey",
    }
    if version >= (0, 30):
        flags["enable_scale_out"] = True
    if transfer != "disk":
        flags["weight_transfer_config"] = {"backend": transfer}
    if version.is_cpu:
        flags["worker_extension_cls"] = "gymexp_worker.PacksTiedHead"
        flags["enable_chunked_prefill"] = False  # see read_version
    if num_api_servers > 1:
        flags["api_server_count"] = num_api_servers
    if shared:
        flags |= {"enable_sleep_mode": True, "gpu_memory_utilization": SHARED_GPU_MEMORY}
    command = [engine.python or sys.executable, "-m", "gymexp_serve", "serve"]
    command.append(str(directory_of(model)))
    for name, value in (flags | engine.args).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return command


def count_api_servers(num_cores: int, num_replicas: int) -> int:
    """For each replica. With hundreds of requests in flight a single process is vLLM's bottleneck."""
    return max(1, min(4, num_cores // (8 * num_replicas)))


def explain(log: Path) -> str:
    """What to do about the failure that vLLM's log shows; empty where nothing known is found."""
    if not log.exists():
        return ""
    text = log.read_bytes()[-200_000:].decode(errors="replace")
    for pattern, advice in _CAUSES:
        if found := re.search(pattern, text):
            line = text[text.rfind("\n", 0, found.start()) + 1 :].split("\n", 1)[0].strip()
            return f"{advice} (vLLM: {line[-300:]})"
    return ""
