"""Which GPUs of this machine sample and which train, decided before anything starts and without torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from dataclasses import dataclass

from gymexp.config import RunConfig
from gymexp.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """engine: hf or vllm. train_gpus, replica_gpus: as CUDA_VISIBLE_DEVICES names them; empty on a machine
    without.

    replica_gpus: one entry a vLLM replica that is to be started; none with `engine.urls` and with engine=hf.
    """

    engine: str
    train_gpus: list[str]
    replica_gpus: list[list[str]]

    @property
    def shared(self) -> bool:
        """Whether a GPU both samples and trains."""
        return bool({gpu for some in self.replica_gpus for gpu in some} & set(self.train_gpus))


def visible_gpus() -> list[str]:
    """The GPUs that a child would see: CUDA_VISIBLE_DEVICES where it is set, else what nvidia-smi lists."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in named.split(",") if gpu and gpu != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    shown = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return shown.stdout.split() if shown.returncode == 0 else []


def place(config: RunConfig, gpus: list[str]) -> Placement:
    """Split `gpus` as the configuration says. Raises ConfigError.

    Unless said otherwise: half of them sample (whole replicas of `engine.tensor_parallel_size`), the others
    train; a single one does both in turn, and all do with `engine.colocate`.
    """
    engine, wanted = config.engine, config.placement
    kind = engine.kind
    if kind == "auto":
        kind = "vllm" if gpus and (engine.python or importlib.util.find_spec("vllm")) else "hf"
    if kind == "hf" or engine.urls:
        train = _count("placement.train_gpus", wanted.train_gpus, min(1, len(gpus)), len(gpus))
        if kind == "hf" and train > 1:
            raise ConfigError(
                f"placement.train_gpus must be 1 with engine=hf, which samples in the trainer's one process, "
                f"got {train}: say engine=vllm"
            )
        return Placement(kind, gpus[:train], [])
    size = engine.tensor_parallel_size
    if not gpus:
        return Placement(kind, [], [[]])
    if engine.colocate or len(gpus) == 1:
        for key, count in (("rollout_gpus", wanted.rollout_gpus), ("train_gpus", wanted.train_gpus)):
            if count not in (None, len(gpus)):
                raise ConfigError(
                    f"placement.{key} must be left out where every GPU both samples and trains "
                    f"({len(gpus)} of them), got {count}"
                )
        if len(gpus) % size:
            raise ConfigError(
                f"engine.tensor_parallel_size must divide the number of GPUs here, {len(gpus)}, got {size}"
            )
        return Placement(kind, gpus, [gpus[i : i + size] for i in range(0, len(gpus), size)])
    if wanted.rollout_gpus is None and wanted.train_gpus is not None:
        rollout = max(len(gpus) - wanted.train_gpus, 0) // size * size
    else:
        rollout = wanted.rollout_gpus or max(len(gpus) // 2 // size, 1) * size
    if rollout % size or rollout < size:
        raise ConfigError(
            f"placement.rollout_gpus must be a multiple of engine.tensor_parallel_size={size}, "
            f"got {rollout}: a replica needs so many"
        )
    _count("placement.rollout_gpus", rollout, rollout, len(gpus))
    apart = len(gpus) - rollout
    train = wanted.train_gpus or apart
    if not train or train > apart:
        raise ConfigError(
            f"placement.rollout_gpus={rollout} and placement.train_gpus={train} must not be more than the "
            f"{len(gpus)} GPUs of this machine together, and both at least 1 (engine.colocate=true: each GPU "
            "samples and trains in turn)"
        )
    replicas = [gpus[i : i + size] for i in range(0, rollout, size)]
    return Placement(kind, gpus[rollout : rollout + train], replicas)


def _count(key: str, wanted: int | None, default: int, there: int) -> int:
    count = default if wanted is None else wanted
    if count > there:
        raise ConfigError(f"{key} must be at most {there}, the number of GPUs here, got {count}")
    return count
