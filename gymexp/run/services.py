"""The processes of a run as the supervisor is told of them: what they are called, how they start, when they
are well."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp

from gymexp.config import RunConfig
from gymexp.gym import attached
from gymexp.gym.servers import GymHost
from gymexp.policy import vllm
from gymexp.policy.model import resolve_path
from gymexp.run import ports
from gymexp.run.directory import RunDirectory
from gymexp.run.placement import Placement
from gymexp.run.supervisor import Child, Service, spawn

_GATEWAY_PATIENCE_S = 30.0


def gateway(
    config: RunConfig, placement: Placement, directory: RunDirectory, sock: socket.socket, urls: Sequence[str]
) -> Service:
    """urls: the engines'. With vLLM the trainer opens each of them, once it has the policy's weights."""
    command = [sys.executable, "-m", "gymexp.policy.gateway", "--fd", str(sock.fileno())]
    for url in urls:
        command += ["--engine-url", url]
    command += ["--tokenizer", resolve_path(config.model.path)]
    command += ["--max-model-len", str(config.model.max_model_len)]
    if placement.engine == "vllm":
        command.append("--hold")
    log = directory.logs / "gateway.log"
    return Service(
        "gateway",
        lambda: spawn(command, log, fds=[sock.fileno()]),
        log,
        ports.url_of(sock),
        health="/v1/models",
        max_restarts=config.gym.max_restarts,
    )


def trainers(
    placement: Placement, directory: RunDirectory, fds: Sequence[int], master_port: int
) -> list[Service]:
    """One process a training GPU, else one; the first is named `trainer`, plays for all, and alone is asked
    to end. fds: of the socket that the hf engine serves on. master_port: where torch's ranks meet."""
    gpus = placement.train_gpus
    num_ranks = max(1, len(gpus))
    common = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    if num_ranks > 1:
        common |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(master_port)}
        common |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks))}

    def rank(number: int) -> Service:
        name = f"trainer-{number}" if number else "trainer"
        log = directory.logs / f"{name}.log"
        command = [sys.executable, "-m", "gymexp.training.process", directory.path]
        env = common | ({"RANK": str(number), "LOCAL_RANK": str(number)} if num_ranks > 1 else {})
        return Service(name, lambda: spawn(command, log, env, () if number else fds), log, job=True)

    return [rank(number) for number in range(num_ranks)]


def vllm_replicas(
    config: RunConfig,
    placement: Placement,
    directory: RunDirectory,
    socks: Sequence[socket.socket],
    gateway_url: str,
) -> list[Service]:
    """Those that are to be started, on the ports that `socks` keep free.

    One that ends comes back with the weights that the run began with: the gateway is told first, and gives it
    requests once the trainer has sent it the policy's. On a GPU that trains there may be no room to come back
    to: the run ends with it.
    """
    if not socks:
        return []
    version = vllm.read_version(config.engine)
    transfer = vllm.transfer_of(config, placement)
    num_api_servers = vllm.count_api_servers(os.cpu_count() or 1, len(socks))

    def replica(index: int, sock: socket.socket, gpus: list[str]) -> Service:
        url, log = ports.url_of(sock), directory.logs / f"vllm-{index}.log"
        port = sock.getsockname()[1]
        command = vllm.serve_command(
            config.model, config.engine, port, version, transfer, placement.shared, num_api_servers
        )
        env = vllm.ENVIRONMENT | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})

        async def start() -> Child:
            if service.epoch:
                await _hold(gateway_url, url)
            return await spawn(command, log, env, reap=True)

        service = Service(
            f"vllm-{index}",
            start,
            log,
            url,
            health="/health",
            max_restarts=0 if placement.shared else config.gym.max_restarts,
            start_timeout_s=config.engine.start_timeout_s,
            explain=vllm.explain,
            retry_start=False,
        )
        return service

    return [replica(i, *at) for i, at in enumerate(zip(socks, placement.replica_gpus, strict=True))]


def gym_servers(
    config: RunConfig, directory: RunDirectory, host: GymHost, socks: Mapping[str, socket.socket]
) -> list[Service]:
    """The host and the servers that it forks, by name."""

    def server(name: str, sock: socket.socket) -> Service:
        log: Path = directory.logs / f"{name}.log"
        url, restarts = ports.url_of(sock), config.gym.max_restarts
        return Service(name, lambda: host.start_server(name, log), log, url, max_restarts=restarts)

    return [Service("gym-host", host.start, host.log), *(server(*item) for item in socks.items())]


def gym_command(
    config: RunConfig, directory: RunDirectory, gym_python: Path, head_port: int, policy_url: str
) -> Service:
    """`gym env start` in the user's own checkout, with all that it starts."""
    log = directory.logs / "gym.log"
    command = attached.start_command(gym_python, config.env, head_port, policy_url)
    env = attached.start_environment(gym_python)
    cwd = Path(config.gym.checkout or ".")
    return Service("gym", lambda: spawn(command, log, env, cwd=cwd, reap=True), log)


async def _hold(gateway_url: str, url: str) -> None:
    timeout = aiohttp.ClientTimeout(total=_GATEWAY_PATIENCE_S)
    body = {"url": url, "open": False}
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.post(f"{gateway_url}/engine", json=body) as response,
        ):
            response.raise_for_status()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise OSError(f"the gateway could not be told to hold {url}: {error!r}") from error
