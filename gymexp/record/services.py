"""Where the trainer's process finds the others: services.json in the run directory."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from gymexp.files import replace_file

_FILE = "services.json"


@dataclass(frozen=True)
class Replica:
    """One instance of an environment: where its agent is, and the services that its rollouts pass through."""

    name: str
    agent: str  # the agent's name in NeMo Gym's file: what a row's agent_ref says
    url: str
    services: list[str]
    resources: list[str]  # those of them that are resources servers
    max_steps: int | None = None  # the agent's limit of model turns


@dataclass(frozen=True)
class Services:
    """What the controller tells the trainer's processes, every rank the same.

    engine_fd: the socket of an hf engine that lives in the trainer; None where servers sample, whose fields
    are those below it.
    """

    control_url: str
    gateway_url: str
    replicas: dict[str, list[Replica]]  # by environment
    engine: str  # hf or vllm
    checkpoint: str | None  # the name of the checkpoint to go on from
    engine_fd: int | None = None
    engine_urls: list[str] = field(default_factory=list)
    transfer: str = "disk"  # the weights' way to the servers: nccl, ipc or disk
    shared: bool = False  # the servers sample on the GPUs that train
    trainer_address: str = "127.0.0.1"  # of rank 0's node, for NCCL to meet at

    def write(self, run: Path) -> None:
        replace_file(run / _FILE, json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, run: Path) -> Services:
        """Raises OSError, or TypeError for a file of another version."""
        found = json.loads((run / _FILE).read_text(encoding="utf-8"))
        replicas = {env: [Replica(**one) for one in some] for env, some in found.pop("replicas").items()}
        return cls(replicas=replicas, **found)
