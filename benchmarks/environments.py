"""Compares rollouts per second of gymexp and of plain NeMo Gym, with a policy that replies without delay.

    python benchmarks/environments.py                               sudoku and workplace, one replica each
    python benchmarks/environments.py --scaling --replicas 1 2      workplace alone, more replicas
    python benchmarks/environments.py --scaling --replicas 1 4 8 12 --concurrency 128 --python PYTHON

"direct" is the least that a user of NeMo Gym must do: POST /run with aiohttp, parse the reply by orjson and
read its reward. The model server calls an OpenAI endpoint (its own process) that returns the scripted reply
with token ids. "gymexp" is the whole way of a rollout: Collector, agent, model server, gateway (tokenizer,
chat template, parser), and an engine (its own process) that returns the reply's token ids.

Each has its own NeMo Gym servers, forked from one host. They are measured in turn in one run, with the same
rows and concurrency in each round. A ratio is the median of the rounds' ratios to "direct" (one replica, one
model server). Each row is played `--group` times, as in GRPO. The script gives the row's answer, or its
ground-truth calls and "Done."; every fourth row gets a wrong reply (benchmarks/scripted.py). The exit code is
1 unless all variants give the same reward for each rollout, and some rewards differ between rollouts. CPU is
milliseconds per rollout of each kind of process; "client" is the Collector or the plain client.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
from scripted import question, write_script

from gymexp.config.group_options import CONF_DIR
from gymexp.config.hydra_schema import register
from gymexp.config.load import load
from gymexp.config.schema import RunConfig
from gymexp.data.rows import load_rows, server_of
from gymexp.data.sources import fetch
from gymexp.gateway.server import load_tokenizer
from gymexp.gym.definitions import POLICY, ensure_environments
from gymexp.gym.host_client import GymHost
from gymexp.gym.install import site_packages
from gymexp.gym.server_plan import Layout, plan
from gymexp.processes import ports
from gymexp.processes.access_keys import Keys
from gymexp.processes.process import spawn
from gymexp.processes.supervisor import Service, Supervisor
from gymexp.record.places import cache_dir
from gymexp.rollout.collect import Collector
from gymexp.rollout.outcome import Failed, Task
from gymexp.rollout.play import Sampling
from gymexp.run.control_endpoint import Control

KEYS = Keys.new()
os.environ |= KEYS.environ()  # for this process and for all processes that it starts
BENCHMARKS = Path(__file__).resolve().parent
TINY = BENCHMARKS.parent / "gymexp" / "assets" / "tiny"
WARM_UP = 8  # rollouts per replica before the first round
JSON = {"Content-Type": "application/json"}
KINDS = ("client", "gateway", "model server", "agent", "resources server", "fake policy")
Rewards = list[float | None]


@dataclass
class Variant:
    """One way to play an environment's rows, with its measurements by round."""

    env: str
    name: str
    play: Callable[[list[Task]], Coroutine[Any, Any, Rewards]]
    seconds: list[float] = field(default_factory=list)
    rewards: list[Rewards] = field(default_factory=list)
    cpu_ms: list[dict[str, float]] = field(default_factory=list)


def main() -> None:
    args = parse()
    config = read_config(args)
    python = ensure_environments(config.gym, config.env, cache_dir(), print)
    tasks = read_tasks(args, config, python)
    tokenizer = load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.json"
        write_script(script, tokenizer, [task.row for of_env in tasks.values() for task in of_env])
        variants = asyncio.run(measure(args, config, python, tasks, len(tokenizer), script))
    problems = [line for env in config.env for line in complaints(env, variants)]
    report(args, variants, python)
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if problems else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--env", nargs="+", choices=("sudoku", "workplace"), default=["sudoku", "workplace"])
    parser.add_argument("--scaling", action="store_true", help="workplace alone, with 1 and 2 replicas")
    parser.add_argument("--replicas", type=int, nargs="+", help="measure gymexp with each of these numbers")
    parser.add_argument("--model-servers", type=int, help="for gymexp; default: one per four replicas")
    parser.add_argument("--rollouts", type=int, default=256, help="rollouts per round and variant")
    parser.add_argument("--group", type=int, default=8, help="rollouts per row in a round")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tokenizer", default=str(TINY), help="ChatML, as Qwen's; default: the tiny policy's"
    )
    parser.add_argument("--python", help="an interpreter that has nemo_gym; default: gymexp's own venv")
    parser.add_argument("--workplace-rows", metavar="FILE", help="JSONL to use instead of generated tasks")
    parser.add_argument("--sudoku-rows", metavar="FILE")
    parser.add_argument("--output", metavar="FILE", help="the JSON file to write the results to")
    args = parser.parse_args()
    if args.scaling:
        args.env = ["workplace"]
    args.replicas = args.replicas or ([1, 2] if args.scaling else [1])
    args.model_servers = args.model_servers or math.ceil(max(args.replicas) / 4)
    return args


def read_config(args: argparse.Namespace) -> RunConfig:
    """Returns the quickstart's configuration from `conf/`, with the environments and replicas of `args`."""
    from hydra import compose, initialize_config_dir

    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = load(compose("train", overrides=["experiment=quickstart", f"env=[{','.join(args.env)}]"]))
    for name, env in config.env.items():
        if file := getattr(args, f"{name}_rows"):
            env.data.source, env.data.train_file, env.data.validation_file = "jsonl", file, file
        env.max_concurrency, env.replicas = args.concurrency, max(args.replicas)
    config.gym.python, config.gym.model_servers = args.python, args.model_servers
    config.rollout.max_retries = 0
    return config


def read_tasks(args: argparse.Namespace, config: RunConfig, python: Path) -> dict[str, list[Task]]:
    """Returns the tasks for all rounds, by environment. Each has a different question, by which the fakes
    choose the reply."""
    tasks = {}
    for name, env in config.env.items():
        path = fetch(name, env, python, cache_dir(), print).train
        rows = load_rows(path, name, env.agent, server=server_of(env.config_path))
        rows = list({question(row): row for row in rows}.values())[: args.rounds * num_rows(args)]
        for row in rows:
            row["responses_create_params"] |= {"temperature": 1.0, "max_output_tokens": env.max_output_tokens}
        tasks[name] = [Task(f"{name}/{i}", name, env.agent, row) for i, row in enumerate(rows)]
    return tasks


def num_rows(args: argparse.Namespace) -> int:
    """Returns the number of rows in a round."""
    return math.ceil(args.rollouts / args.group)


async def measure(
    args: argparse.Namespace,
    config: RunConfig,
    python: Path,
    tasks: dict[str, list[Task]],
    vocab_size: int,
    script: Path,
) -> list[Variant]:
    """Starts all processes as a run does, plays the rounds and ends all processes."""
    sockets = {name: ports.listen() for name in ("chat", "engine", "gateway")}
    control = Control(ports.listen(), KEYS.run, lambda _: None)
    supervisor = control.supervisor = Supervisor(
        health_interval_s=config.gym.health_interval_s,
        health_timeout_s=config.gym.health_timeout_s,
        start_timeout_s=config.gym.start_timeout_s,
        on_change=control.changed,
    )
    variants: list[Variant] = []
    async with control:
        with ExitStack() as stack:
            try:
                start_policy(supervisor, args.tokenizer, sockets, script)
                layout = start_servers(supervisor, config, python, sockets, script.parent)
                await supervisor.wait_ready(list(sockets), config.gym.start_timeout_s)
                for name, env in config.env.items():
                    url = layout.replicas[f"{name}-direct"][0].url
                    variants.append(Variant(name, "direct", PlainClient(url, args.concurrency).play))
                    for num in args.replicas:
                        replicas = {name: layout.replicas[name][:num]}
                        collector = Collector(replicas, {name: env}, config.rollout, vocab_size, control.url)
                        stack.callback(collector.close)
                        stack.callback(collector.stop)
                        variants.append(Variant(name, f"gymexp x{num}", WholeStack(collector).play))
                playing = asyncio.create_task(play_rounds(args, variants, tasks, supervisor, layout))
                await asyncio.wait({playing, supervisor.failed}, return_when=asyncio.FIRST_COMPLETED)
                if not playing.done():
                    playing.cancel()
                    supervisor.failed.result()
                playing.result()
                return variants
            finally:
                await asyncio.to_thread(stack.close)  # in a thread, as the control endpoint must still answer
                await supervisor.close(["gateway"])
                for sock in sockets.values():
                    sock.close()


def start_policy(
    supervisor: Supervisor, tokenizer: str, sockets: dict[str, Any], script: Path, reply_s: float = 0.0
) -> None:
    """Starts a gateway on each socket of such a name, as a run does, and the two fakes, whose replies take
    `reply_s` seconds."""
    fake = [sys.executable, str(BENCHMARKS / "scripted.py"), "--script", str(script)]
    fake += ["--reply-s", str(reply_s)]
    gateway = [sys.executable, "-m", "gymexp.gateway.server", "--tokenizer", tokenizer]
    gateway += ["--engine-url", ports.url_of(sockets["engine"]), "--max-model-len", "32768"]

    def add(name: str, command: list[str], health: str) -> None:
        fd, log = sockets[name].fileno(), script.with_name(f"{name}.log")
        command = [*command, "--fd", str(fd)]
        url = ports.url_of(sockets[name])
        supervisor.add(
            Service(name, lambda: spawn(command, log, fds=[fd]), log, url, health=health, key=KEYS.run)
        )

    add("chat", [*fake, "chat"], "/health")
    add("engine", [*fake, "engine"], "/health")
    for name in sockets:
        if name.startswith("gateway"):
            add(name, gateway, "/v1/models")


def start_servers(
    supervisor: Supervisor, config: RunConfig, python: Path, sockets: dict[str, Any], logs: Path
) -> Layout:
    """Starts NeMo Gym's servers of a run, and for each environment a replica "<env>-direct", whose model
    server calls the fake chat endpoint. Adds their sockets to `sockets`."""
    server_sockets: dict[str, Any] = {}

    def port(name: str) -> int:
        server_sockets[name] = ports.listen()
        return server_sockets[name].getsockname()[1]

    site = site_packages(python)
    url = ports.url_of(sockets["gateway"])
    layout = plan(config.env, config.gym, site, [url], port, key=KEYS.policy)
    envs = {f"{name}-direct": dataclasses.replace(env, replicas=1) for name, env in config.env.items()}
    gym = dataclasses.replace(config.gym, model_servers=1)
    other = f"{POLICY}-direct"  # both plans have a server named POLICY, so the second one is renamed
    direct = plan(
        envs, gym, site, [ports.url_of(sockets["chat"])], lambda n: port(other if n == POLICY else n)
    )
    layout.config |= json.loads(json.dumps(direct.config).replace(f'"{POLICY}"', f'"{other}"'))
    layout.modules |= {other if name == POLICY else name: module for name, module in direct.modules.items()}
    layout.replicas |= direct.replicas
    host = GymHost(python, layout, server_sockets, logs / "gym-host.log")
    supervisor.add(Service("gym-host", host.start, host.log))

    def add(name: str) -> None:
        log = logs / f"{name}.log"
        url = ports.url_of(server_sockets[name])
        supervisor.add(Service(name, lambda: host.start_server(name, log), log, url))

    for name in server_sockets:
        add(name)
    sockets |= server_sockets
    return layout


@dataclass
class PlainClient:
    """A client of NeMo Gym's agent, as a user without gymexp would write it."""

    url: str
    concurrency: int

    async def play(self, tasks: list[Task]) -> Rewards:
        rewards: Rewards = [None] * len(tasks)
        todo = iter(enumerate(tasks))
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:

            async def work() -> None:
                for index, task in todo:
                    data = orjson.dumps(task.row)
                    async with http.post(f"{self.url}/run", data=data, headers=JSON) as response:
                        response.raise_for_status()
                        rewards[index] = orjson.loads(await response.read())["reward"]

            await asyncio.gather(*(work() for _ in range(self.concurrency)))
        return rewards


@dataclass
class WholeStack:
    """Plays rollouts by a Collector, as a training run does."""

    collector: Collector

    async def play(self, tasks: list[Task]) -> Rewards:
        samplings = [
            Sampling(
                temperature=1.0,
                max_output_tokens=task.row["responses_create_params"]["max_output_tokens"],
                seed=seed,
            )
            for seed, task in enumerate(tasks)
        ]
        outcomes = await asyncio.to_thread(self.collector.collect, tasks, samplings)
        for failed in [o for o in outcomes if isinstance(o, Failed)][:3]:
            print(f"{failed.task.key}: {failed.cause}: {failed.detail}", file=sys.stderr)
        return [None if isinstance(o, Failed) else o.rollout.reward for o in outcomes]


async def play_rounds(
    args: argparse.Namespace,
    variants: list[Variant],
    tasks: dict[str, list[Task]],
    supervisor: Supervisor,
    layout: Layout,
) -> None:
    for variant in variants:
        await variant.play(tasks[variant.env][-WARM_UP * max(args.replicas) :])
    for number in range(args.rounds):
        for env, rows in tasks.items():
            distinct = [rows[(number * num_rows(args) + i) % len(rows)] for i in range(num_rows(args))]
            batch = [task for task in distinct for _ in range(args.group)][: args.rollouts]
            compared = [v for v in variants if v.env == env]
            turn = number % len(compared)  # the rounds begin with different variants
            for variant in compared[turn:] + compared[:turn]:
                before, began = cpu_seconds(supervisor, layout), time.perf_counter()
                variant.rewards.append(await variant.play(batch))
                variant.seconds.append(time.perf_counter() - began)
                after = cpu_seconds(supervisor, layout)
                variant.cpu_ms.append({k: 1e3 * (after[k] - before[k]) / len(batch) for k in KINDS})
                rate = len(batch) / variant.seconds[-1]
                print(f"round {number + 1}  {env:<10}{variant.name:<12}{rate:8.1f} rollouts/s", flush=True)


def cpu_seconds(supervisor: Supervisor, layout: Layout) -> dict[str, float]:
    """Returns the CPU seconds so far of each kind of process."""
    kinds = ("responses_api_models", "responses_api_agents", "resources_servers")
    servers = dict(zip(kinds, KINDS[2:5], strict=True))
    seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)

    def count(kind: str, pid: int) -> None:
        times = psutil.Process(pid).cpu_times()
        seconds[kind] += times.user + times.system

    count("client", os.getpid())
    for name, service in supervisor.services.items():
        if service.pid and name != "gym-host":
            kind = "gateway" if name == "gateway" else "fake policy"
            count(servers[next(iter(layout.config[name]))] if name in layout.config else kind, service.pid)
    return seconds


def complaints(env: str, variants: list[Variant]) -> list[str]:
    """Returns the problems that make an environment's comparison worthless: failures, rewards that differ
    from those of "direct", or one reward for all rollouts."""
    direct, *others = [v for v in variants if v.env == env]
    problems = []
    if len({reward for rewards in direct.rewards for reward in rewards}) < 2:
        problems.append(f"{env}: every reward is {direct.rewards[0][0]}")
    for other in others:
        for number, (want, got) in enumerate(zip(direct.rewards, other.rewards, strict=True), 1):
            if want != got:
                differ = [i for i, (a, b) in enumerate(zip(want, got, strict=True)) if a != b]
                text = f"{len(differ)} rewards differ, first {got[differ[0]]} for {want[differ[0]]}"
                problems.append(f"{env}: {other.name}, round {number}: {text} at rollout {differ[0]}")
    return problems


def report(args: argparse.Namespace, variants: list[Variant], python: Path) -> None:
    """Prints a table, and writes the results with facts about the machine to --output."""
    results = []
    print(f"\nCPU: ms a rollout of {', '.join(KINDS)}")
    print(f"{'':<22}{'rollouts/s':>11}{'ratio':>7}{'reward':>8}   CPU")
    for variant in variants:
        direct = next(v for v in variants if v.env == variant.env)
        rates = [args.rollouts / s for s in variant.seconds]
        ratios = [a / b for a, b in zip(direct.seconds, variant.seconds, strict=True)]
        rate, ratio = statistics.median(rates), statistics.median(ratios)
        reward = statistics.mean(r or 0 for rewards in variant.rewards for r in rewards)
        cpu = {kind: statistics.median(c[kind] for c in variant.cpu_ms) for kind in KINDS}
        shown = " ".join(f"{ms:7.1f}" for ms in cpu.values())
        print(f"{variant.env:<10}{variant.name:<12}{rate:>11.1f}{ratio:>7.2f}{reward:>8.3f}   {shown}")
        results.append(
            {"env": variant.env, "variant": variant.name, "rollouts_per_s": rate, "ratio": ratio}
            | {"rounds": rates, "round_ratios": ratios, "mean_reward": reward, "cpu_ms_per_rollout": cpu}
        )
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    model = next((li.partition(":")[2].strip() for li in lines if li.startswith("model name")), "")
    machine = {"cores": os.cpu_count(), "cpu": model or platform.processor()}
    print(f"{machine['cores']} cores, {machine['cpu']}")
    if args.output:
        gym = next(site_packages(python).glob("nemo_gym-*.dist-info")).stem.split("-")[1]
        versions = {name: version(name) for name in ("aiohttp", "orjson", "transformers")}
        numbers = ("rollouts", "group", "concurrency", "rounds", "replicas", "model_servers")
        record = {
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": machine,
            "versions": {"python": platform.python_version(), "nemo_gym": gym} | versions,
            "arguments": {name: getattr(args, name) for name in numbers},
            "tokenizer": Path(args.tokenizer).name,
            "results": results,
        }
        Path(args.output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
