"""A node of a run: it starts processes and opens sockets, on this machine or on another one."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gymexp.cluster.placement import visible_gpus
from gymexp.cluster.slurm_job import Task, read_task
from gymexp.errors import ConfigError
from gymexp.processes import ports
from gymexp.processes.process import Running, spawn


def lead_of(num_nodes: int, task: Task | None) -> Task:
    """Returns `task` as the lead of a run over `num_nodes` nodes.

    Raises ConfigError if this process is not in a Slurm job of that many tasks.
    """
    if task is None or task.count != num_nodes:
        found = "none is running" if task is None else f"job {task.attempt} has {task.count}"
        raise ConfigError(
            f"placement.rollout_nodes and placement.train_nodes need a Slurm job of {num_nodes} tasks, one a "
            f"node, and {found}: say launcher=slurm, or start the same job on every node by srun"
        )
    return task


@dataclass(frozen=True)
class Endpoint:
    """The address of a socket on a node.

    fd: the socket's file descriptor in the process that opened it, and in every process that inherits it.
    """

    host: str
    port: int
    fd: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


class Node(Protocol):
    """A machine of the run. gpus: its GPUs, as its CUDA_VISIBLE_DEVICES names them."""

    name: str
    address: str
    gpus: list[str]

    async def listen(self) -> Endpoint:
        """Open a listening socket for a server that inherits it (`ports.listen`)."""
        ...

    async def reserve(self, exclusive: bool = True) -> Endpoint:
        """Reserve a port for a server that opens its own socket (`ports.reserve`)."""
        ...

    async def spawn(
        self,
        command: Sequence[str | os.PathLike[str]],
        log: Path,
        env: Mapping[str, str] | None = None,
        fds: Sequence[int] = (),
        reap: bool = False,
    ) -> Running:
        """Start a command on this node, as `process.spawn` does. `log` is on a file system that all nodes
        share."""
        ...


class LocalNode:
    """The machine that this process runs on."""

    def __init__(self, gpus: list[str], name: str = "localhost", address: str = "127.0.0.1") -> None:
        self.name = name
        self.address = address
        self.gpus = gpus
        self._socks: list[socket.socket] = []

    async def listen(self) -> Endpoint:
        return self._keep(ports.listen(self.address))

    async def reserve(self, exclusive: bool = True) -> Endpoint:
        return self._keep(ports.reserve(self.address, exclusive))

    async def spawn(
        self,
        command: Sequence[str | os.PathLike[str]],
        log: Path,
        env: Mapping[str, str] | None = None,
        fds: Sequence[int] = (),
        reap: bool = False,
    ) -> Running:
        return await spawn(command, log, env, fds, reap=reap)

    def _keep(self, sock: socket.socket) -> Endpoint:
        self._socks.append(sock)
        host, port = sock.getsockname()
        return Endpoint(host, port, sock.fileno())

    def close(self) -> None:
        for sock in self._socks:
            sock.close()


def this_node(count: int) -> tuple[LocalNode, Task | None]:
    """Returns this machine as a node of a run over `count` nodes, and this process's task as the lead.

    The task is None if `count` is 1. Otherwise raises ConfigError if this process is not in a Slurm job of
    `count` tasks.
    """
    if count == 1:
        return LocalNode([]), None
    task = lead_of(count, read_task())
    return LocalNode(visible_gpus(), task.node, ports.address_of(task.node)), task
