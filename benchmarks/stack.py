"""The stack that benchmarks/rollouts.py measures: the servers of a training run, and two ways to use them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil

from gymexp.config.schema import RunConfig
from gymexp.engine import vllm
from gymexp.errors import GymexpError
from gymexp.gateway import chat
from gymexp.gym.host_client import GymHost
from gymexp.gym.install import site_packages
from gymexp.gym.server_plan import Layout, plan
from gymexp.policy.hub_snapshot import directory_of
from gymexp.processes import ports
from gymexp.processes.access_keys import Keys, header
from gymexp.processes.process import spawn
from gymexp.processes.supervisor import Service, Supervisor
from gymexp.rollout.collect import Collector
from gymexp.rollout.outcome import Failed, Task
from gymexp.rollout.play import Sampling

JSON = {"Content-Type": "application/json"}
KEYS = Keys.new()
os.environ |= KEYS.environ()  # for this process and for all processes that it starts
SERVERS = {
    "responses_api_models": "model server",
    "responses_api_agents": "agent",
    "resources_servers": "resources server",
}
KINDS = ("client", "gateway", *SERVERS.values(), "vLLM API server", "vLLM engine")


@dataclass
class Batch:
    """The rollouts of a round: rollout i has prompt_ids[i] and gets samplings[i].max_output_tokens tokens."""

    tasks: list[Task]
    prompt_ids: list[list[int]]
    samplings: list[Sampling]


@dataclass
class Count:
    """Counts of one batch, played one way.

    short: replies without the requested number of tokens. other_prompts: rollouts with other prompt ids than
    those of the batch.
    """

    tokens: int = 0
    short: int = 0
    failed: int = 0
    other_prompts: int = 0


@dataclass
class Stack:
    """The running servers, and the two ways to play a batch on them: `play` and `play_directly`."""

    supervisor: Supervisor
    layout: Layout
    engine_url: str
    stop_token_ids: list[int]
    max_model_len: int
    collectors: dict[int, Collector] = field(default_factory=dict)

    async def play(self, batch: Batch, concurrency: int) -> Count:
        """Plays a batch through the whole stack, as a training run does."""
        count = Count()
        outcomes = await asyncio.to_thread(self.collectors[concurrency].collect, batch.tasks, batch.samplings)
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, Failed):
                count.failed += 1
                if count.failed <= 2:
                    print(f"  failed: {outcome.cause}: {outcome.detail[:500]}", file=sys.stderr)
                continue
            turns = outcome.rollout.turns
            num = sum(len(turn.completion_ids) for turn in turns)
            count.tokens += num
            count.short += num != batch.samplings[index].max_output_tokens
            count.other_prompts += turns[0].prompt_ids != batch.prompt_ids[index]
        return count

    async def play_directly(self, batch: Batch, concurrency: int, seeded: bool = True) -> Count:
        """Plays a batch on vLLM itself, with one client."""
        count = Count()
        todo = iter(range(len(batch.prompt_ids)))
        bodies = [self.body(p, s, seeded) for p, s in zip(batch.prompt_ids, batch.samplings, strict=True)]
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(
            self.engine_url, connector=connector, timeout=timeout, headers=header(KEYS.engine)
        ) as http:

            async def work() -> None:
                for index in todo:
                    async with http.post(
                        "/inference/v1/generate", data=bodies[index], headers=JSON
                    ) as response:
                        answer = await response.read()
                    if response.status != 200:
                        count.failed += 1
                        if count.failed <= 2:
                            print(f"  failed: {response.status}: {answer[:300]!r}", file=sys.stderr)
                        continue
                    choice = orjson.loads(answer)["choices"][0]
                    num = len([entry["logprob"] for entry in choice["logprobs"]["content"]])
                    assert num == len(choice["token_ids"])
                    count.tokens += num
                    count.short += num != batch.samplings[index].max_output_tokens

            await asyncio.gather(*(work() for _ in range(min(concurrency, len(bodies)))))
        return count

    def body(self, prompt_ids: list[int], sampling: Sampling, seeded: bool) -> bytes:
        """Returns the request body that the gateway would send for this rollout."""
        fields = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_output_tokens,
            "seed": sampling.seed if seeded else None,
        }
        params = chat.sampling_params(fields, len(prompt_ids), self.max_model_len)
        params["stop_token_ids"] = self.stop_token_ids
        return orjson.dumps({"token_ids": prompt_ids, "sampling_params": params})

    async def empty_cache(self) -> None:
        """Empties vLLM's prefix cache. The server must run in development mode, as `start_vllm` starts it."""
        timeout = aiohttp.ClientTimeout(total=60)
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=header(KEYS.engine)) as http,
            http.post(f"{self.engine_url}/reset_prefix_cache") as response,
        ):
            if response.status != 200:
                raise GymexpError(f"{self.engine_url}/reset_prefix_cache answered {response.status}")

    async def engine_steps(self) -> float | None:
        """Returns the number of vLLM's forward passes so far; None if /metrics does not have it."""
        timeout = aiohttp.ClientTimeout(total=60)
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=header(KEYS.engine)) as http,
            http.get(f"{self.engine_url}/metrics") as response,
        ):
            text = await response.text()
        counts = re.findall(r"^vllm:iteration_tokens_total_count\S* (\S+)$", text, re.MULTILINE)
        return sum(map(float, counts)) if counts else None

    def processes(self) -> list[tuple[str, psutil.Process]]:
        """Returns the client's and the servers' processes, each with its kind."""
        found = [("client", psutil.Process(os.getpid()))]
        for name, service in self.supervisor.services.items():
            if not service.pid or name == "gym-host":
                continue
            process = psutil.Process(service.pid)
            if name == "vllm":
                found += [(part_of_vllm(child), child) for child in process.children(recursive=True)]
            elif name in self.layout.config:
                found.append((SERVERS[next(iter(self.layout.config[name]))], process))
            else:
                found.append(("gateway", process))
        return found


def part_of_vllm(process: psutil.Process) -> str:
    title = ""
    with contextlib.suppress(psutil.Error):
        title = " ".join(process.cmdline()) or process.name()
    return "vLLM engine" if "EngineCore" in title or "Worker" in title else "vLLM API server"


def cpu_seconds(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return times.user + times.system
    return 0.0


def start_vllm(supervisor: Supervisor, config: RunConfig, port: int, logs: Path) -> None:
    version = vllm.read_version(config.engine)
    command = vllm.serve_command(config.model, config.engine, port, version, transfer="disk")
    log = logs / "vllm.log"
    say(f"vLLM {version[0]}.{version[1]}: {' '.join(command[3:])}")
    supervisor.add(
        Service(
            "vllm",
            lambda: spawn(command, log, vllm.environment("disk"), reap=True),
            log,
            f"http://127.0.0.1:{port}",
            health="/health",
            key=KEYS.engine,
            explain=vllm.explain,
        )
    )


def start_gateways(
    supervisor: Supervisor, config: RunConfig, engine_url: str, gateways: list[Any], logs: Path
) -> None:
    command = [sys.executable, "-m", "gymexp.gateway.server", "--tokenizer"]
    command.append(str(directory_of(config.model)))
    command += ["--engine-url", engine_url, "--max-model-len", str(config.model.max_model_len)]

    def add(name: str, sock: Any) -> None:
        log, fd = logs / f"{name}.log", sock.fileno()
        own = [*command, "--fd", str(fd)]
        start = lambda: spawn(own, log, fds=[fd])  # noqa: E731
        supervisor.add(Service(name, start, log, ports.url_of(sock), health="/v1/models", key=KEYS.run))

    for index, sock in enumerate(gateways):
        add(f"gateway-{index}", sock)


def start_servers(
    supervisor: Supervisor,
    config: RunConfig,
    python: Path,
    gateways: list[Any],
    sockets: dict[str, Any],
    logs: Path,
) -> Layout:
    """Starts NeMo Gym's servers of a run, and adds their sockets to `sockets`."""

    def port(name: str) -> int:
        sockets[name] = ports.listen()
        return sockets[name].getsockname()[1]

    urls = [ports.url_of(sock) for sock in gateways]
    layout = plan(config.env, config.gym, site_packages(python), urls, port, key=KEYS.policy)
    host = GymHost(python, layout, sockets, logs / "gym-host.log")
    supervisor.add(Service("gym-host", host.start, host.log))

    def add(name: str) -> None:
        log = logs / f"{name}.log"
        url = ports.url_of(sockets[name])
        supervisor.add(Service(name, lambda: host.start_server(name, log), log, url))

    for name in sockets:
        add(name)
    return layout


async def wait_ready(supervisor: Supervisor, deadline_s: float) -> None:
    began = time.monotonic()
    waiting = asyncio.create_task(supervisor.wait_ready(list(supervisor.services), deadline_s))
    while not (await asyncio.wait({waiting}, timeout=10.0))[0]:
        missing = [s.name for s in supervisor.services.values() if s.state != "ready"]
        say(f"{time.monotonic() - began:4.0f} s: waiting for {' '.join(missing)}")
    waiting.result()
    say(f"all ready after {time.monotonic() - began:.0f} s")


def say(text: str) -> None:
    print(text, flush=True)
