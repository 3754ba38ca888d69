"""The placement of a run: which GPUs sample and which train, on one node or over several. It is decided
before any process starts, and without torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from gymexp.config import lora_rules
from gymexp.config.schema import EngineConfig, PlacementConfig, RunConfig
from gymexp.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """Some GPUs of one node, as the node's CUDA_VISIBLE_DEVICES names them; no GPUs on a CPU-only node. node:
    the node's number."""

    node: int
    gpus: list[str]


@dataclass(frozen=True)
class Placement:
    """The GPUs that train and those that sample. engine: hf, vllm, or none for a policy that is text alone.
    training: one share for each node that trains. replicas: one share for each engine server that the run
    starts; empty with `engine.urls`, and with engine=hf on one node that samples and trains in turn, which
    samples in the trainer's process.
    """

    engine: str
    training: list[Share]
    replicas: list[Share]

    @property
    def shared(self) -> bool:
        """Whether a GPU both samples and trains."""
        sampling = {(share.node, gpu) for share in self.replicas for gpu in share.gpus}
        return any((share.node, gpu) in sampling for share in self.training for gpu in share.gpus)

    @property
    def in_trainer(self) -> bool:
        """Whether the trainer's own process samples."""
        return self.engine == "hf" and not self.replicas

    @property
    def num_ranks(self) -> int:
        """The number of the trainer's ranks: one for each training GPU, and one for a training node without
        GPUs."""
        return sum(max(1, len(share.gpus)) for share in self.training)

    @property
    def num_train_gpus(self) -> int:
        return sum(len(share.gpus) for share in self.training)

    def halves_cores(self, share: Share) -> bool:
        """Whether an hf engine and a trainer compute at the same time on the cores of the share's node."""
        on_cores = [
            any(one.node == share.node and not one.gpus for one in shares)
            for shares in (self.training, self.replicas)
        ]
        return self.engine == "hf" and not share.gpus and all(on_cores)


def num_nodes(placement: PlacementConfig) -> int:
    """Returns the number of nodes of the run, each of which is one Slurm task."""
    return 1 if placement.rollout_nodes is None else placement.rollout_nodes + placement.train_nodes


def visible_gpus() -> list[str]:
    """Returns the GPUs that a child process would see: those of CUDA_VISIBLE_DEVICES if it is set, else those
    that nvidia-smi lists."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in named.split(",") if gpu and gpu != "-1"]
    return [index for (index,) in _nvidia_smi("index")]


def compute_capabilities() -> list[tuple[int, int]]:
    """Returns the compute capability of each GPU that a child process would see, e.g. (9, 0) of an H100."""
    rows = _nvidia_smi("index,uuid,compute_cap")
    # A part of a GPU (MIG) has a name that nvidia-smi does not list here: any of the GPUs may be its own.
    found = [
        cap
        for gpu in visible_gpus()
        for cap in [cap for index, uuid, cap in rows if index == gpu or uuid.startswith(gpu)]
        or [cap for _, _, cap in rows]
    ]
    return [(int(cap.split(".")[0]), int(cap.split(".")[1])) for cap in found]


def _nvidia_smi(fields: str) -> list[list[str]]:
    """Returns these fields of each GPU of the machine; [] if nvidia-smi is missing or fails."""
    if not shutil.which("nvidia-smi"):
        return []
    result = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return [line.split(", ") for line in result.stdout.splitlines()] if result.returncode == 0 else []


def place(config: RunConfig, nodes: Sequence[list[str]]) -> Placement:
    """Returns which of the GPUs in `nodes` sample and which train, according to the configuration.

    On one node the default is that half of the GPUs sample (in whole replicas of
    `engine.tensor_parallel_size`) and the others train. A single GPU does both in turn, and with
    `engine.colocate` every GPU does. Of several nodes the first `placement.rollout_nodes` sample with all
    their GPUs, and the others train with all of theirs. With `overlap` no GPU does both, and the hf engine
    is a server of its own. Raises ConfigError if the configuration does not fit the GPUs.
    """
    kind, rollout_nodes = _kind(config.engine, nodes), config.placement.rollout_nodes
    overlaps = config.overlap.max_staleness > 0
    is_server = kind == "hf" and (overlaps or rollout_nodes is not None)
    why = "over several nodes" if rollout_nodes is not None else "and overlap.max_staleness above 0"
    if is_server and config.engine.weights not in ("auto", "disk"):
        raise ConfigError(f"engine.weights must be disk with engine=hf {why}, got {config.engine.weights!r}")
    if is_server and lora_rules.is_sent(config.model.lora):
        raise ConfigError(f"model.lora.sync must be merged with engine=hf {why}, got 'adapter'")
    if rollout_nodes is not None:
        return _place_over_nodes(config, kind, nodes, rollout_nodes)
    placement = _place_on_one(config, kind, nodes[0])
    if overlaps and placement.shared:
        raise ConfigError(
            "overlap.max_staleness must be 0 where a GPU both samples and trains, as with one GPU or "
            f"engine.colocate=true, got {config.overlap.max_staleness}: use a GPU more, or leave it out"
        )
    return placement


def place_evaluation(config: RunConfig, gpus: list[str]) -> Placement:
    """Returns which of this machine's GPUs sample in an evaluation, where nothing trains: with vLLM all of
    them, in replicas of `engine.tensor_parallel_size`; with the hf engine, in the evaluator's process, one.

    Raises ConfigError if the replicas do not fit the GPUs.
    """
    if (kind := _kind(config.engine, [gpus])) == "hf":
        return _on_one(kind, gpus[:1], [])
    size = config.engine.tensor_parallel_size
    if len(gpus) % size:
        raise ConfigError(
            f"engine.tensor_parallel_size must divide the number of GPUs here, {len(gpus)}, got {size}"
        )
    return _on_one(kind, [], [gpus[i : i + size] for i in range(0, max(1, len(gpus)), size)])


def place_text_policy() -> Placement:
    """Returns the placement of an evaluation without an engine."""
    return _on_one("none", [], [])


def _kind(engine: EngineConfig, nodes: Sequence[list[str]]) -> str:
    """Returns the engine: `engine.kind`, where auto is vllm if a GPU and vLLM are present."""
    if engine.kind != "auto":
        return engine.kind
    return "vllm" if any(nodes) and (engine.python or importlib.util.find_spec("vllm")) else "hf"


def _place_over_nodes(config: RunConfig, kind: str, nodes: Sequence[list[str]], rollout: int) -> Placement:
    size = config.engine.tensor_parallel_size if kind == "vllm" else 1
    for number, gpus in enumerate(nodes[:rollout]):
        if len(gpus) % size:
            raise ConfigError(
                f"engine.tensor_parallel_size must divide the GPUs of every rollout node, got {size}, and "
                f"node {number} has {len(gpus)}"
            )
    training = [Share(number, gpus) for number, gpus in enumerate(nodes)][rollout:]
    if without := [str(share.node) for share in training if any(nodes) and not share.gpus]:
        raise ConfigError(
            f"placement.train_nodes={len(training)} need GPUs where another node has some, but node "
            f"{', '.join(without)} has none: ask Slurm for as many on every node (--gpus-per-node)"
        )
    replicas = [
        Share(number, gpus[i : i + size])
        for number, gpus in enumerate(nodes[:rollout])
        for i in range(0, max(1, len(gpus)), size)
    ]
    return Placement(kind, training, replicas)


def _place_on_one(config: RunConfig, kind: str, gpus: list[str]) -> Placement:
    engine, placement = config.engine, config.placement
    in_trainer = kind == "hf" and not config.overlap.max_staleness
    if in_trainer or engine.urls:
        train = _count("placement.train_gpus", placement.train_gpus, min(1, len(gpus)), len(gpus))
        if in_trainer and train > 1:
            raise ConfigError(
                f"placement.train_gpus must be 1 with engine=hf, which samples in the trainer's one process, "
                f"got {train}: say engine=vllm"
            )
        return _on_one(kind, gpus[:train], [])
    size = engine.tensor_parallel_size if kind == "vllm" else 1
    if not gpus:
        return _on_one(kind, [], [[]])
    if engine.colocate or len(gpus) == 1:
        for key, count in (("rollout_gpus", placement.rollout_gpus), ("train_gpus", placement.train_gpus)):
            if count not in (None, len(gpus)):
                raise ConfigError(
                    f"placement.{key} must be left out where every GPU both samples and trains "
                    f"({len(gpus)} of them), got {count}"
                )
        if len(gpus) % size:
            raise ConfigError(
                f"engine.tensor_parallel_size must divide the number of GPUs here, {len(gpus)}, got {size}"
            )
        return _on_one(kind, gpus, [gpus[i : i + size] for i in range(0, len(gpus), size)])
    if placement.rollout_gpus is None and placement.train_gpus is not None:
        rollout = max(len(gpus) - placement.train_gpus, 0) // size * size
    else:
        rollout = placement.rollout_gpus or max(len(gpus) // 2 // size, 1) * size
    if rollout % size or rollout < size:
        raise ConfigError(
            f"placement.rollout_gpus must be a multiple of engine.tensor_parallel_size={size}, "
            f"got {rollout}: each replica needs {size} GPUs"
        )
    _count("placement.rollout_gpus", rollout, rollout, len(gpus))
    apart = len(gpus) - rollout
    train = placement.train_gpus or apart
    if not train or train > apart:
        raise ConfigError(
            f"placement.rollout_gpus={rollout} and placement.train_gpus={train} must not be more than the "
            f"{len(gpus)} GPUs of this machine together, and both at least 1 (engine.colocate=true: each GPU "
            "samples and trains in turn)"
        )
    replicas = [gpus[i : i + size] for i in range(0, rollout, size)]
    return _on_one(kind, gpus[rollout : rollout + train], replicas)


def _on_one(kind: str, train_gpus: list[str], replica_gpus: list[list[str]]) -> Placement:
    return Placement(kind, [Share(0, train_gpus)], [Share(0, gpus) for gpus in replica_gpus])


def _count(key: str, value: int | None, default: int, available: int) -> int:
    """Returns the option's `value`, or `default` for None. Raises ConfigError if it is above `available`."""
    count = default if value is None else value
    if count > available:
        raise ConfigError(f"{key} must be at most {available}, the number of GPUs here, got {count}")
    return count


def transfer_of(config: RunConfig, placement: Placement) -> str:
    """Returns how the trainer's weights reach the engine's servers: `engine.weights` unless it is auto.

    With auto: ipc if GPUs are shared, nccl if training and sampling use different GPUs, and disk if no GPU
    trains, no engine is started, or vLLM is not installed beside gymexp. Always disk for the hf engine, and
    adapter for vLLM with `model.lora.sync=adapter`.
    """
    if placement.engine == "hf":
        return "disk"
    if lora_rules.is_sent(config.model.lora):
        return "adapter"
    if config.engine.weights != "auto":
        return config.engine.weights
    if placement.shared:
        return "ipc"
    apart = placement.num_train_gpus and placement.replicas
    return "nccl" if apart and importlib.util.find_spec("vllm") else "disk"
