"""services.json in the run directory: the addresses of the run's services, for the trainer's processes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from gymexp.files import replace_file

_FILE = "services.json"


def gateway_name(number: int) -> str:
    """Returns the name of a gateway's service, and of its log."""
    return f"gateway-{number}" if number else "gateway"


@dataclass(frozen=True)
class Replica:
    """One instance of an environment: the address that plays its rows, and the services that do so."""

    name: str
    agent: str  # the agent's name in NeMo Gym's YAML file, which a row names in agent_ref
    url: str
    services: list[str]
    resources: list[str]  # the resources servers among `services`
    max_steps: int | None = None  # the agent's limit of model turns
    # whether `url` is that of an environment server of NeMo Gym 0.7, which takes typed episodes
    takes_episodes: bool = False
    spare: bool = False  # whether its services start at the trainer's request alone (replicas=auto)
    gateway: int = 0  # the gateway that its model server asks, among `Services.gateway_urls`


@dataclass(frozen=True)
class Services:
    """What the trainer's processes need to know of the run's other processes; the same for every rank.

    engine_fd: the socket of an hf engine inside the trainer; None if servers sample. The fields after it
    describe these servers.
    """

    control_url: str
    gateway_urls: list[str]
    replicas: dict[str, list[Replica]]  # by environment name
    engine: str  # hf or vllm
    checkpoint: str | None  # the name of the checkpoint to resume from
    engine_fd: int | None = None
    engine_urls: list[str] = field(default_factory=list)
    transfer: str = "disk"  # how weights reach the servers: nccl, ipc, disk or adapter
    shared: bool = False  # whether the servers sample on the GPUs that train
    trainer_address: str = "127.0.0.1"  # address of rank 0's node, where the ranks of NCCL meet

    def write(self, run: Path) -> None:
        replace_file(run / _FILE, json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, run: Path) -> Services:
        """Reads services.json of a run directory. Raises OSError, or TypeError if its fields are others."""
        fields = json.loads((run / _FILE).read_text(encoding="utf-8"))
        replicas = {env: [Replica(**one) for one in ones] for env, ones in fields.pop("replicas").items()}
        return cls(replicas=replicas, **fields)
