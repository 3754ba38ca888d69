"""vLLM as the engine: builds the `vllm serve` command of a replica, and explains its log if it cannot start.

gymexp runs vLLM as it is published. The routes that gymexp needs (token ids in and out, pause, weight
transfer) are vLLM's own: VLLM_SERVER_DEV_MODE=1 and, from 0.30, --enable-scale-out switch them on.
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
from gymexp.engine import adapter
from gymexp.errors import ConfigError
from gymexp.policy.hub_snapshot import directory_of

IN_VLLM = Path(__file__).resolve().parent / "in_vllm"
OLDEST, NEWEST = (0, 26), (0, 31)  # the oldest that has these routes, the newest that TRL 1.16 takes
SHARED_GPU_MEMORY = 0.5  # of a GPU that also trains; vLLM frees this share while it sleeps

# A pattern of the log, and advice what to do. `explain` gives the advice of the first pattern that it finds.
_CAUSES = (
    (
        r"Free memory on device .* is less than desired GPU memory utilization",
        "the GPU is in use by another program: end that program, leave the GPU out of "
        "CUDA_VISIBLE_DEVICES, or set engine.args.gpu_memory_utilization=… to a smaller share",
    ),
    (
        r"No available memory for the cache blocks|larger than the available KV cache memory"
        r"|Available KV cache memory: -",
        "the model leaves too little GPU memory for keys and values: set a smaller model.max_model_len, "
        "a larger engine.args.gpu_memory_utilization, or engine.tensor_parallel_size=2",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError",
        "the model does not fit into the GPU's memory: set engine.tensor_parallel_size=2, or a smaller model",
    ),
    (
        r"is not a local folder and is not a valid model identifier|Repo id must be in the form"
        r"|Repository Not Found|LocalEntryNotFoundError|couldn't connect to 'https://huggingface\.co'",
        "model.path was not found: it must be a directory, or a hub id that this machine can reach",
    ),
    (
        r"unrecognized arguments: (.*)",
        "engine.args has a flag that this `vllm serve` does not know",
    ),
    (
        r"cannot import name 'NamespaceTool'|No module named 'openai",
        "the openai package beside vLLM is too old for it (NeMo Gym's, perhaps): give vLLM an environment "
        "of its own and name its interpreter in engine.python",
    ),
    (
        r"No module named 'ray'",
        "this vLLM's CUDA IPC imports ray: install ray beside it, or set engine.weights=disk",
    ),
    (r"No CUDA GPUs are available|NVIDIA driver .* too old", "vLLM finds no GPU that it can use"),
    (
        r"does not support LoRA yet",
        "vLLM cannot serve an adapter of this model: set model.lora.sync=merged",
    ),
)


class Version(NamedTuple):
    """The version of an installed vLLM."""

    major: int
    minor: int
    is_cpu: bool = False  # a build without CUDA


def read_version(engine: EngineConfig) -> Version:
    """Returns the version of the vLLM that `engine.python` has. Raises ConfigError if the interpreter cannot
    run, or has no vLLM or one of an unsupported version, or if `engine.args` asks a vLLM on a CPU for chunked
    prefill.
    """
    python = engine.python or sys.executable
    code = "import importlib.metadata as m; print(m.version('vllm'))"
    try:
        shown = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    except OSError as error:
        raise ConfigError(f"engine.python={python} cannot be run: {error.strerror}") from None
    match = re.match(r"(\d+)\.(\d+)", shown.stdout.strip())
    if shown.returncode or not match:
        raise ConfigError(
            f"engine=vllm needs vLLM, and {python} has none: install it there (in a checkout of gymexp: "
            "pip install -e '.[vllm]'), or name an interpreter that has it in engine.python"
        )
    version = Version(int(match[1]), int(match[2]), "+cpu" in shown.stdout)
    if not OLDEST <= version[:2] <= NEWEST:
        raise ConfigError(
            f"engine=vllm needs vLLM {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, {python} has "
            f"{shown.stdout.strip()}"
        )
    if version.is_cpu and engine.args.get("enable_chunked_prefill"):
        # After a chunk that is not the prompt's last, vLLM sets the generator of a seeded request back.
        # torch's CPU generator cannot do that, and the engine ends (seen in 0.31, gpu_model_runner.py).
        raise ConfigError(
            "engine.args.enable_chunked_prefill must be false with a vLLM on a CPU, which ends at the first "
            "prompt that is cut into chunks if its request has a seed, as every request of gymexp has: leave "
            "it out"
        )
    return version


def environment(transfer: str) -> dict[str, str]:
    """Returns the environment variables of a replica. transfer: how weights reach it: nccl, ipc, disk or
    adapter.

    Each way needs routes of vLLM's development mode: /pause, /resume and /reset_prefix_cache for all,
    /collective_rpc for disk, those of weight transfer for nccl and ipc. With ipc alone, vLLM unpickles data
    (handles to GPU memory), and unpickling runs code of the sender. vLLM's own key guards none of these
    routes, so `in_vllm/gymexp_key.py` demands the engine's key on every path. With adapter alone, vLLM loads
    adapters while it runs.
    """
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(IN_VLLM), os.environ.get("PYTHONPATH"))))
    variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1" if transfer == "ipc" else "0"
    variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1" if transfer == "adapter" else "0"
    # Else vLLM would sample from the model alone where a request names an adapter that it does not have.
    variables["VLLM_SKIP_MODEL_NAME_VALIDATION"] = "0"
    # The user may have this key for other servers. vLLM would demand it in addition to the engine's key.
    variables["VLLM_API_KEY"] = ""
    return variables


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
    """Returns the `vllm serve` command of one replica. transfer: how weights reach it: nccl, ipc, disk or
    adapter.

    shared: whether its GPU also trains. num_api_servers: number of processes that take requests
    (`count_api_servers`). host: the address that the replica listens on.
    """
    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "served_model_name": "policy",
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "tensor_parallel_size": engine.tensor_parallel_size,
        # The trainer's ratios need log-probabilities of the distribution that was sampled from.
        "logprobs_mode": "processed_logprobs",
        # Without this, the model's generation_config.json would change the sampling unnoticed by the trainer.
        "generation_config": "vllm",
        "middleware": "gymexp_key.DemandsKey",
    }
    if version >= (0, 30):
        flags["enable_scale_out"] = True
    if transfer in ("nccl", "ipc"):
        flags["weight_transfer_config"] = {"backend": transfer}
    if transfer == "adapter":
        assert model.lora.r is not None
        flags |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": adapter.max_rank(model.lora.r)}
        num_api_servers = 1  # vLLM refuses more: each would know only the adapters that it has loaded itself
    if version.is_cpu:
        flags["worker_extension_cls"] = "gymexp_worker.PacksTiedHead"
        flags["enable_chunked_prefill"] = False  # `read_version` has the reason
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
    """Returns the number of API servers of a replica: with hundreds of requests, one is vLLM's bottleneck."""
    return max(1, min(4, num_cores // (8 * num_replicas)))


def explain(log: Path) -> str:
    """Returns advice on the failure in vLLM's log, with the log's line; "" if no known failure is found."""
    if not log.exists():
        return ""
    text = log.read_bytes()[-200_000:].decode(errors="replace")
    for pattern, advice in _CAUSES:
        if match := re.search(pattern, text):
            line = text[text.rfind("\n", 0, match.start()) + 1 :].split("\n", 1)[0].strip()
            return f"{advice} (vLLM: {line[-300:]})"
    return ""
