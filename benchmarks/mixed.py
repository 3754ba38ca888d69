"""Plays six environments in one run, and compares each one's rollouts per second with those it has alone.

    python benchmarks/mixed.py            writes benchmarks/results/mixed_<cores>_cores.json

Five of the environments are tasks of reasoning_gym, one turn each; the sixth is the workplace, which has
several turns and the slowest server. The policy is scripted (benchmarks/scripted.py). Its replies take no
time, which shows the most that gymexp and the servers can do, and then as long as a short reply of a model.
"alone" is a collection of one environment, with one replica. "beside" is a collection of all six at once:
with replicas=1, and with replicas=auto after `--settle` collections in which these follow the slowest.
All of them are measured in turn in each round; a ratio is the median of the rounds' ratios to "alone". An
environment's rate counts until its own last rollout. The exit code is 1 unless each rollout has the same
reward in all three.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from environments import KEYS, TINY, read_config, read_tasks, start_policy
from scripted import write_script

from gymexp.config.schema import RunConfig
from gymexp.gateway.server import load_tokenizer
from gymexp.gym.definitions import ensure_environments
from gymexp.gym.host_client import GymHost
from gymexp.gym.install import site_packages
from gymexp.gym.server_plan import Layout, plan
from gymexp.processes import ports
from gymexp.processes.supervisor import Service, Supervisor
from gymexp.record.places import cache_dir
from gymexp.rollout.collect import Collector
from gymexp.rollout.outcome import Failed, Outcome, Task, task_of
from gymexp.rollout.play import Sampling
from gymexp.rollout.spare_replicas import paces_of
from gymexp.run.control_endpoint import Control

RESULTS = Path(__file__).resolve().parent / "results"
TASKS = ("letter_counting", "number_sorting", "spell_backward", "chain_sum")  # beside mini_sudoku
WAYS = ("alone", "replicas=1", "replicas=auto")
GATEWAYS = ("gateway", "gateway-1")  # one for each model server, as in a run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rollouts", type=int, default=64, help="of each environment in a collection")
    parser.add_argument("--group", type=int, default=8, help="rollouts per row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settle", type=int, default=4, help="collections with replicas=auto before a round")
    parser.add_argument("--reply-s", type=float, nargs="+", default=[0.0, 2.0], help="seconds of a reply")
    parser.add_argument("--python", help="an interpreter that has nemo_gym; default: gymexp's own venv")
    args = parser.parse_args()
    config = six(args)
    python = ensure_environments(config.gym, config.env, cache_dir(), print)
    tasks = read_tasks(args, config, python)
    found, differ = {}, False
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.json"
        tokenizer = load_tokenizer(str(TINY))
        write_script(script, tokenizer, [task.row for of_env in tasks.values() for task in of_env])
        for reply_s in args.reply_s:
            measured = measure(args, config, python, tasks, len(tokenizer), script, reply_s)
            rates, rewards, replicas = asyncio.run(measured)
            found[reply_s] = figures(rates, replicas)
            differ |= any(other != rewards[WAYS[0]] for other in rewards.values())
            write(args, found)
    if differ:
        sys.exit("error: the rewards of the ways differ")


def six(args: argparse.Namespace) -> RunConfig:
    """Returns the configuration of the six environments, all with replicas=auto."""
    own = {"env": ["sudoku", "workplace"], "replicas": [1], "model_servers": len(GATEWAYS), "concurrency": 64}
    own |= {"sudoku_rows": None, "workplace_rows": None, "python": args.python}
    config = read_config(argparse.Namespace(**own))
    sudoku = config.env["sudoku"]
    for name in TASKS:
        data = dataclasses.replace(sudoku.data, options={"task": name})
        config.env[name] = dataclasses.replace(sudoku, data=data)
    for env in config.env.values():
        env.replicas = "auto"
        env.data.train_size = max(env.data.train_size or 0, 256)
    return config


async def measure(
    args: argparse.Namespace,
    config: RunConfig,
    python: Path,
    tasks: dict[str, list[Task]],
    vocab_size: int,
    script: Path,
    reply_s: float,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, Any]], dict[str, int]]:
    """Returns the rates by way and environment, the rewards by way and rollout, and the replicas at the end
    with replicas=auto."""
    sockets = {name: ports.listen() for name in ("chat", "engine", *GATEWAYS)}
    control = Control(ports.listen(), KEYS.run, lambda _: None)
    supervisor = control.supervisor = Supervisor(
        health_interval_s=config.gym.health_interval_s,
        health_timeout_s=config.gym.health_timeout_s,
        start_timeout_s=config.gym.start_timeout_s,
        on_change=control.changed,
    )
    rates: dict[str, dict[str, list[float]]] = {way: {env: [] for env in tasks} for way in WAYS}
    rewards: dict[str, dict[str, Any]] = {way: {} for way in WAYS}
    replicas: dict[str, int] = {}
    async with control:
        with ExitStack() as stack:
            try:
                start_policy(supervisor, str(TINY), sockets, script, reply_s)
                layout = start_servers(supervisor, config, python, sockets, script.parent)
                await supervisor.wait_ready(list(sockets), config.gym.start_timeout_s)
                ones = {env: [r for r in own if not r.spare] for env, own in layout.replicas.items()}

                def collector(of: dict[str, Any]) -> Collector:
                    made = Collector(of, config.env, config.rollout, vocab_size, control.url)
                    stack.callback(made.close)
                    stack.callback(made.stop)
                    return made

                one, auto = collector(ones), collector(layout.replicas)

                async def play(way: str, number: int, envs: list[str], by: Collector) -> None:
                    batch = [t for env in envs for t in batch_of(args, tasks[env], number)]
                    outcomes = await asyncio.to_thread(by.collect, batch, samplings_of(batch))
                    note(outcomes, number, rewards[way])
                    for env, pace in paces_of(outcomes).items():
                        rates[way][env].append(pace.per_second)
                        replicas[env] = pace.replicas

                every = list(tasks)
                warm_up = [t for env in every for t in batch_of(args, tasks[env], 0)]
                await asyncio.to_thread(one.collect, warm_up, samplings_of(warm_up))
                for number in range(args.rounds):
                    for env in every:
                        await play("alone", number, [env], one)
                    await play("replicas=1", number, every, one)
                    for _ in range(args.settle):
                        await asyncio.to_thread(auto.collect, warm_up, samplings_of(warm_up))
                        await asyncio.sleep(1.0)  # a step trains now, while replicas start
                    await play("replicas=auto", number, every, auto)
                    print(f"replies of {reply_s:g} s, round {number + 1}: {replicas}", flush=True)
                return rates, rewards, dict(replicas)
            finally:
                await asyncio.to_thread(stack.close)
                await supervisor.close(GATEWAYS)
                for sock in sockets.values():
                    sock.close()


def start_servers(
    supervisor: Supervisor, config: RunConfig, python: Path, sockets: dict[str, Any], logs: Path
) -> Layout:
    """Starts NeMo Gym's servers as a run does, and keeps those of spare replicas for later."""
    server_sockets: dict[str, Any] = {}

    def port(name: str) -> int:
        server_sockets[name] = ports.listen()
        return server_sockets[name].getsockname()[1]

    urls = [ports.url_of(sockets[name]) for name in GATEWAYS]
    layout = plan(config.env, config.gym, site_packages(python), urls, port, key=KEYS.policy)
    host = GymHost(python, layout, server_sockets, logs / "gym-host.log")
    supervisor.add(Service("gym-host", host.start, host.log))

    def add(name: str, sock: Any) -> None:
        log = logs / f"{name}.log"
        start = lambda: host.start_server(name, log)  # noqa: E731
        supervisor.add(Service(name, start, log, ports.url_of(sock), spare=name in layout.spares))

    for item in server_sockets.items():
        add(*item)
    sockets |= server_sockets
    return layout


def batch_of(args: argparse.Namespace, rows: list[Task], number: int) -> list[Task]:
    """Returns an environment's rollouts of a round."""
    count = -(-args.rollouts // args.group)
    some = [rows[(number * count + i) % len(rows)] for i in range(count)]
    return [task for task in some for _ in range(args.group)][: args.rollouts]


def samplings_of(batch: list[Task]) -> list[Sampling]:
    limits = [task.row["responses_create_params"]["max_output_tokens"] for task in batch]
    return [Sampling(temperature=1.0, max_output_tokens=n, seed=i) for i, n in enumerate(limits)]


def note(outcomes: list[Outcome], number: int, rewards: dict[str, Any]) -> None:
    """Adds the rewards of each task in a round; None for a rollout that failed."""
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            print(f"{outcome.task.key}: {outcome.cause}: {outcome.detail}", file=sys.stderr)
        reward = None if isinstance(outcome, Failed) else outcome.rollout.reward
        rewards.setdefault(f"{number}/{task_of(outcome).key}", []).append(reward)


def figures(rates: dict[str, dict[str, list[float]]], replicas: dict[str, int]) -> dict[str, Any]:
    ratios = {
        way: {
            env: statistics.median(
                beside / alone for beside, alone in zip(rates[way][env], rates["alone"][env], strict=True)
            )
            for env in rates["alone"]
        }
        for way in WAYS[1:]
    }
    return {"rollouts_per_second": rates, "ratio_to_alone": ratios, "replicas": replicas}


def write(args: argparse.Namespace, found: dict[float, dict[str, Any]]) -> None:
    cores = len(os.sched_getaffinity(0))
    path = RESULTS / f"mixed_{cores}_cores.json"
    arguments = vars(args) | {"python": None, "cores": cores}
    path.write_text(json.dumps({"arguments": arguments, "reply_s": found}, indent=1) + "\n")
    print("| a reply takes | environment | alone, rollouts/s | replicas=1 | replicas=auto | replicas |")
    print("|---|---|---|---|---|---|")
    for reply_s, of in found.items():
        for env, alone in of["rollouts_per_second"]["alone"].items():
            beside = " | ".join(f"{of['ratio_to_alone'][way][env]:.2f}" for way in WAYS[1:])
            alone_per_s = f"{statistics.median(alone):.1f}"
            print(f"| {reply_s:g} s | {env} | {alone_per_s} | {beside} | {of['replicas'][env]} |")


if __name__ == "__main__":
    main()
