"""Builds the supervisor's `Service` for each process of a run: its name, its start and its health check."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from gymexp.cluster.node import Endpoint, Node
from gymexp.cluster.placement import Placement, Share, transfer_of
from gymexp.config.schema import RunConfig
from gymexp.engine import vllm
from gymexp.engine.admission import Admission
from gymexp.gym import attached
from gymexp.gym.host_client import GymHost
from gymexp.gym.install import missing_package
from gymexp.gym.server_plan import Layout, plan
from gymexp.gym.server_venvs import python_of
from gymexp.policy.hub_snapshot import directory_of
from gymexp.processes import ports
from gymexp.processes.access_keys import ENGINE, POLICY, Keys
from gymexp.processes.failure_reason import last_exception
from gymexp.processes.process import Running, spawn
from gymexp.processes.supervisor import Service, Supervisor
from gymexp.record.directory import RunDirectory
from gymexp.record.services_file import Services, gateway_name
from gymexp.run.work import Work

_GATEWAY_TIMEOUT_S = 30.0
# A thread of the trainer sends a sign of life every few seconds, but Python may delay the thread, for example
# while a library writes or loads a large file.
_TRAINER_SILENCE_S = 900.0

_START_FIX = "mend what its exception names, e.g. by one of its keys, {}.<key>"


def listen_for_gateways(config: RunConfig, work: Work, address: str) -> list[socket.socket]:
    """Returns a listening socket for each gateway: one for each model server. A policy that is text alone has
    one gateway, so that all of its requests wait if its endpoint asks for a pause."""
    first = ports.listen(address, config.gym.policy_port or 0, key="gym.policy_port")
    others = 0 if work.text_policy else config.gym.model_servers - 1
    return [first, *(ports.listen(address) for _ in range(others))]


def gateways(
    config: RunConfig,
    placement: Placement,
    directory: RunDirectory,
    socks: Sequence[socket.socket],
    urls: Sequence[str],
    keys: Keys,
    work: Work,
) -> list[Service]:
    """Returns the services of the gateways in front of the engines, or of a policy that is text alone, each
    on its socket.

    urls: the engines' URLs. In training an engine server gets requests once the trainer has sent it the
    policy's weights.
    """
    command = [sys.executable, "-m", "gymexp.gateway.server"]
    if work.text_policy:
        command = [sys.executable, "-m", "gymexp.gateway.text_gateway", *work.text_policy]
    else:
        for url in urls:
            command += ["--engine-url", url]
        command += ["--tokenizer", str(directory_of(config.model))]
        command += ["--max-model-len", str(config.model.max_model_len)]
        if work.sends_weights and not placement.in_trainer:
            command.append("--hold")
            if transfer_of(config, placement) == "adapter":
                command.append("--adapter")
        if len(socks) > 1:
            command.append("--one-of-several")

    def gateway(number: int, sock: socket.socket) -> Service:
        name, fd = gateway_name(number), sock.fileno()
        log = directory.logs / f"{name}.log"
        return Service(
            name,
            lambda: spawn([*command, "--fd", str(fd)], log, keys.environ(), [fd]),
            log,
            ports.url_of(sock),
            health="/v1/models",
            key=keys.run,
            max_restarts=config.gym.max_restarts,
        )

    return [gateway(*pair) for pair in enumerate(socks)]


def trainers(
    placement: Placement,
    directory: RunDirectory,
    nodes: Sequence[Node],
    fds: Sequence[int],
    master: Endpoint,
    keys: Keys,
    work: Work,
) -> list[Service]:
    """Returns the trainer's processes: one per training GPU, or one per training node without GPUs.

    Rank 0 is named `trainer`, plays the rollouts of all ranks, and is the only one that the controller
    signals to end. An evaluation has one process, the evaluator. fds: the socket on which the hf engine
    inside rank 0 serves. master: the endpoint at which torch's ranks meet, on rank 0's node.
    """
    num_ranks = placement.num_ranks

    def rank(number: int, local: int, share: Share) -> Service:
        name = f"{work.process}-{number}" if number else work.process
        log = directory.logs / f"{name}.log"
        command = [sys.executable, "-m", work.module, directory.path, *work.arguments]
        env = keys.environ()
        if share.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
        if num_ranks > 1:
            local_size = max(1, len(share.gpus))
            env |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(local_size)}
            env |= {"MASTER_ADDR": master.host, "MASTER_PORT": str(master.port)}
            env |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // local_size))}
            env |= {"RANK": str(number), "LOCAL_RANK": str(local)}
        elif placement.halves_cores(share):
            env |= _half_of_the_cores()
        node = nodes[share.node]
        return Service(
            name,
            lambda: node.spawn(command, log, env, () if number else fds),
            log,
            job=True,
            silence_s=_TRAINER_SILENCE_S,
        )

    places = [(i, share) for share in placement.training for i in range(max(1, len(share.gpus)))]
    return [rank(number, *place) for number, place in enumerate(places)]


def _half_of_the_cores() -> dict[str, str]:
    """Returns variables for a process that shares the cores with another one. More threads than cores would
    slow both down."""
    if os.environ.get("OMP_NUM_THREADS"):
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}


def engines(
    config: RunConfig,
    placement: Placement,
    directory: RunDirectory,
    nodes: Sequence[Node],
    endpoints: Sequence[Endpoint],
    gateway_urls: Sequence[str],
    keys: Keys,
    work: Work,
) -> list[Service]:
    """Returns the engine servers that gymexp starts, each on its endpoint: a reserved port for vLLM, a socket
    for the hf engine.

    A restarted engine has the weights that the run began with. So in training the gateways hold requests back
    from it before the restart, until the trainer has sent it the policy's weights. An engine that shares its
    GPU with training is never restarted, as the GPU may lack the memory: its end is the run's end.
    """
    if not placement.replicas:
        return []
    admission = Admission(gateway_urls, keys.run, _GATEWAY_TIMEOUT_S)
    command_of = _vllm_command(config, placement) if placement.engine == "vllm" else _hf_command(directory)

    def replica(index: int, endpoint: Endpoint, share: Share) -> Service:
        name, node = f"{placement.engine}-{index}", nodes[share.node]
        log = directory.logs / f"{name}.log"
        command, fds = command_of(endpoint)
        env = {ENGINE: keys.engine}
        if placement.engine == "vllm":
            env |= vllm.environment(transfer_of(config, placement))
        if share.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
        elif placement.halves_cores(share):
            env |= _half_of_the_cores()

        async def start() -> Running:
            if service.epoch and work.sends_weights:
                await asyncio.to_thread(admission.hold, endpoint.url)
            return await node.spawn(command, log, env, fds, reap=placement.engine == "vllm")

        service = Service(
            name,
            start,
            log,
            endpoint.url,
            health="/health",
            key=keys.engine,
            max_restarts=0 if placement.shared else config.gym.max_restarts,
            start_timeout_s=config.engine.start_timeout_s,
            explain=vllm.explain if placement.engine == "vllm" else lambda _: "",
            retry_start=False,
        )
        return service

    return [replica(i, *pair) for i, pair in enumerate(zip(endpoints, placement.replicas, strict=True))]


_Command = Callable[
    [Endpoint], tuple[list[str], list[int]]
]  # returns the command and the sockets it inherits


def _vllm_command(config: RunConfig, placement: Placement) -> _Command:
    version = vllm.read_version(config.engine)
    transfer = transfer_of(config, placement)
    replicas = placement.replicas
    max_per_node = max(sum(other.node == share.node for other in replicas) for share in replicas)
    num_api_servers = vllm.count_api_servers(os.cpu_count() or 1, max_per_node)
    shared = placement.shared
    return lambda endpoint: (
        vllm.serve_command(
            config.model,
            config.engine,
            endpoint.port,
            version,
            transfer,
            shared,
            num_api_servers,
            endpoint.host,
        ),
        [],
    )


def _hf_command(directory: RunDirectory) -> _Command:
    command = [sys.executable, "-m", "gymexp.engine.hf.replica", str(directory.config), "--fd"]
    return lambda endpoint: ([*command, str(endpoint.fd)], [endpoint.fd])


def by_interpreter(
    layout: Layout, gym_python: Path, site: Path, sockets: Mapping[str, socket.socket]
) -> dict[Path, dict[str, socket.socket]]:
    """Returns the servers' sockets by name, for each interpreter with what they need: NeMo Gym's first."""
    found: dict[Path, dict[str, socket.socket]] = {gym_python: {}}
    for name, sock in sockets.items():
        folder = "/".join(layout.modules[name].split(".")[:2])
        found.setdefault(python_of(folder, gym_python, site), {})[name] = sock
    return found


def gym_servers(
    config: RunConfig,
    directory: RunDirectory,
    layout: Layout,
    sockets: Mapping[Path, Mapping[str, socket.socket]],
    keys: Keys,
    heard: Callable[[str], None],
) -> list[Service]:
    """Returns the services of the gym hosts, one for each interpreter, and of the servers that they fork.

    sockets: of `by_interpreter`. heard: called at each sign of life of a host, with its name.
    """

    def host_and_servers(number: int, python: Path, socks: Mapping[str, socket.socket]) -> Iterator[Service]:
        host_name = f"gym-host-{number}" if number > 1 else "gym-host"
        host = GymHost(python, layout, socks, directory.logs / f"{host_name}.log", keys.policy)

        def explain(log: Path) -> str:
            return missing_package(last_exception(log.read_text(errors="replace")), python)

        def server(name: str, sock: socket.socket) -> Service:
            log: Path = directory.logs / f"{name}.log"
            url, restarts = ports.url_of(sock), config.gym.max_restarts
            start = lambda: host.start_server(name, log)  # noqa: E731
            more = {"key": keys.policy, "explain": explain, "spare": name in layout.spares}
            if at := layout.keys.get(name):
                more |= {"owner": ".".join(at.split(".")[:2]), "start_fix": _START_FIX.format(at)}
            return Service(name, start, log, url, max_restarts=restarts, **more)

        silence_s = config.gym.health_timeout_s
        start = lambda: host.start(lambda: heard(host_name))  # noqa: E731
        yield Service(host_name, start, host.log, silence_s=silence_s, explain=explain)
        yield from (server(*item) for item in socks.items())

    hosts = enumerate(sockets.items(), start=1)
    return [service for number, item in hosts for service in host_and_servers(number, *item)]


def gym_command(
    config: RunConfig, directory: RunDirectory, gym_python: Path, head_port: int, policy_url: str, keys: Keys
) -> Service:
    """Returns the service of `gym env start` in the user's own checkout, whose servers end with it."""
    log = directory.logs / "gym.log"
    command = attached.start_command(gym_python, config.env, head_port, policy_url)
    env = attached.start_environment(gym_python) | {POLICY: keys.policy}
    cwd = Path(config.gym.checkout or ".")
    return Service("gym", lambda: spawn(command, log, env, cwd=cwd, reap=True), log)


async def gym_layout(
    config: RunConfig,
    directory: RunDirectory,
    supervisor: Supervisor,
    gym_python: Path,
    site: Path,
    policy_urls: Sequence[str],
    sockets: dict[str, socket.socket],
    address: str,
    keys: Keys,
    work: Work,
) -> Layout:
    """Returns the layout of the environments' servers: planned ones, or those that run already.

    With gym.runtime=cli this adds `gym env start` to the supervisor and waits until its agents answer.
    sockets: receives a socket by name for each server that gymexp starts. address: this node's address.
    """
    gym = config.gym
    if gym.runtime == "attach":
        head = attached.read_head(gym.head_host, gym.head_port)
        key = attached.check_policy(head, gym.policy_port or 0)
        attached.replicas_of(
            head, config.env
        )  # fails now if an agent is missing, as it would be missing later
        head_address = gym.head_host, gym.head_port
        replicas = await attached.wait_for_agents(*head_address, config.env, gym.start_timeout_s)
        return Layout(replicas=replicas, policy_key=key)
    if gym.runtime == "cli":
        with ports.listen() as free:
            head_port = free.getsockname()[1]
        supervisor.add(gym_command(config, directory, gym_python, head_port, policy_urls[0], keys))
        finding = asyncio.create_task(
            attached.wait_for_agents("127.0.0.1", head_port, config.env, gym.start_timeout_s)
        )
        try:
            await asyncio.wait({finding, supervisor.failed}, return_when=asyncio.FIRST_COMPLETED)
            if supervisor.failed.done():
                supervisor.failed.result()
            return Layout(replicas=await finding)
        finally:
            finding.cancel()

    def port(name: str) -> int:
        sockets[name] = ports.listen(address)
        return sockets[name].getsockname()[1]

    kwargs = config.model.chat_template_kwargs
    gives_tokens = not work.text_policy
    given = policy_urls, port, kwargs, address, keys.policy, gives_tokens
    return plan(config.env, gym, site, *given, python=gym_python)


def engine_urls(config: RunConfig, endpoints: Sequence[Endpoint]) -> list[str]:
    """Returns the URLs of the engine servers. endpoints: those of the servers that gymexp starts."""
    return config.engine.urls or [endpoint.url for endpoint in endpoints]


def build_services(
    config: RunConfig,
    placement: Placement,
    layout: Layout,
    urls: tuple[str, list[str]],
    endpoints: Sequence[Endpoint],
    trainer_address: str,
    checkpoint: Path | None,
) -> Services:
    """Returns the content of services.json, which every rank of the trainer reads.

    urls: those of the control endpoint and of the gateways. trainer_address: the address of rank 0's node.
    """
    common = Services(*urls, layout.replicas, placement.engine, checkpoint and checkpoint.name)
    if placement.in_trainer:
        return dataclasses.replace(common, engine_fd=endpoints[0].fd)
    return dataclasses.replace(
        common,
        engine_urls=engine_urls(config, endpoints),
        transfer=transfer_of(config, placement),
        shared=placement.shared,
        trainer_address=trainer_address,
    )
