"""Compares generated tokens per second through the whole stack and from the same vLLM called directly.

    python benchmarks/make_model.py outputs/model_4b --size 4b
    python benchmarks/rollouts.py --model outputs/model_4b --api-server-count 4 --replicas 4 --model-servers 2

"stack" is the way of a rollout in training: Collector, NeMo Gym's agent (sudoku, one turn), its model
server, gateway, vLLM; the reply is verified, scored and read. "direct" is one aiohttp client that posts the
same prompt ids and sampling parameters (with seeds and log-probabilities) to /inference/v1/generate of the
same server and reads ids and log-probabilities. The prompt ids come from the gateway, by the rollouts of the
warm-up; the prompt of every later rollout is compared with them.

For each concurrency a round plays `--waves` times as many rollouts as may be in flight, in groups of
`--group` with one prompt. It submits all of them at once. The two ways take turns, and each is first in
every other round. The prefix cache is empty, as after an update of the weights. A ratio is the median of the
rounds' ratios. The ratio with one request in flight shows an endpoint that handles its requests one by one.

With a model of make_model.py every reply has exactly the requested length, without a parameter such as
ignore_eos: `--tokens`, or a number drawn between (1 - spread) and (1 + spread) times `--tokens`, the same for
both ways. Equal lengths are the hardest case: all replies end, and must be scored, at the same moment.

CPU is milliseconds per rollout of each kind of process. "busiest" is the share of one core that the busiest
process of a kind used; near 1, this process is the bottleneck. With --engine-url, vLLM's CPU is missing. "a
step" is the number of tokens that vLLM sampled per forward pass: fewer than with "direct" means that requests
reach vLLM late. `--unseeded` also measures "direct" without seeds, to show what seeds cost in vLLM.

Results are written after every measurement. A measurement that would probably not end by --deadline-s is not
begun.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import math
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import facts
from omegaconf import OmegaConf
from stack import (
    KEYS,
    KINDS,
    Batch,
    Stack,
    cpu_seconds,
    say,
    start_gateways,
    start_servers,
    start_vllm,
    wait_ready,
)

from gymexp.config.group_options import CONF_DIR
from gymexp.config.hydra_schema import register
from gymexp.config.load import load
from gymexp.config.schema import RunConfig
from gymexp.data.rows import load_rows, server_of
from gymexp.data.sources import fetch
from gymexp.errors import GymexpError
from gymexp.gateway.server import load_tokenizer
from gymexp.gym.definitions import ensure_environments
from gymexp.processes import ports
from gymexp.processes.supervisor import Supervisor
from gymexp.record.places import cache_dir
from gymexp.rollout.collect import Collector
from gymexp.rollout.outcome import Failed, Task
from gymexp.rollout.play import Sampling
from gymexp.rollout.tokens import end_of_turn_ids
from gymexp.run.control_endpoint import Control

ENV = "sudoku"
TARGETS = {256: 0.95, 1024: 0.9}
MIN_ROLLOUTS = 4  # per round, for a concurrency of one
TO_END_S = 60.0  # the time to end all processes after the deadline


def main() -> None:
    args = parse()
    threading.Thread(target=end_hard, args=(args.deadline_s + TO_END_S,), daemon=True).start()
    with ExitStack() as stack:
        logs = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        logs.mkdir(parents=True, exist_ok=True)
        report = Report(args)
        try:
            asyncio.run(measure(args, report, logs))
        except Exception as error:  # any error: the measurements so far must be written
            report.error = f"{type(error).__name__}: {error}"
            if not isinstance(error, GymexpError | TimeoutError):
                traceback.print_exc()
        report.write()
    report.show()
    for line in report.complaints():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if report.complaints() else 0)


def end_hard(after_s: float) -> None:
    """Ends this process after `after_s`, in case something hangs. Its child processes end with it."""
    time.sleep(after_s)
    print(f"error: not ended after {after_s:.0f} s: ending at once", file=sys.stderr, flush=True)
    os._exit(3)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="a model directory, e.g. of make_model.py")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine-url", help="a vLLM that serves the model already; default: start one")
    parser.add_argument("--engine-python", help="an interpreter that has vLLM; default: this one")
    parser.add_argument("--api-server-count", type=int, help="API servers of the vLLM that is started")
    parser.add_argument(
        "--engine-arg", action="append", default=[], metavar="NAME=VALUE", help="as engine.args.NAME=VALUE"
    )
    parser.add_argument("--gym-python", help="an interpreter that has nemo_gym; default: gymexp's own venv")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--tokens", type=int, default=512, help="tokens per reply")
    parser.add_argument("--spread", type=float, default=0.0, help="spread of the replies' lengths, 0 to 1")
    parser.add_argument("--waves", type=int, default=1)
    parser.add_argument("--group", type=int, default=16, help="rollouts per prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=4, help="replicas of agent and resources server")
    parser.add_argument("--model-servers", type=int, default=2)
    parser.add_argument("--gateways", type=int, default=1, help="model servers share them in turn")
    parser.add_argument("--unseeded", action="store_true", help="also measure 'direct' without seeds")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--start-timeout-s", type=float, default=300.0)
    parser.add_argument("--deadline-s", type=float, default=540.0, help="counted from this script's start")
    parser.add_argument("--logs", type=Path, help="the directory to keep the servers' logs in")
    parser.add_argument("--output", type=Path, default=facts.RESULTS / "rollouts.json")
    args = parser.parse_args()
    args.until = time.monotonic() + args.deadline_s
    if args.gateways > args.model_servers:
        parser.error("--gateways must be at most --model-servers: each model server uses one gateway")
    if not 0 <= args.spread < 1:
        parser.error("--spread must be at least 0 and less than 1")
    return args


def read_config(args: argparse.Namespace) -> RunConfig:
    """Returns the configuration of a run with the model and the servers of this benchmark."""
    from hydra import compose, initialize_config_dir

    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = load(compose("train", overrides=[f"env=[{ENV}]"]))
    model, engine, gym, env = config.model, config.engine, config.gym, config.env[ENV]
    model.name, model.path, model.dtype = "benchmark", str(args.model.resolve()), args.dtype
    model.max_model_len = args.max_model_len
    engine_args: Any = OmegaConf.to_container(OmegaConf.from_dotlist(args.engine_arg))
    engine.kind, engine.python = "vllm", args.engine_python
    engine.args = {"max_num_seqs": max(args.concurrency)} | engine_args
    if args.api_server_count:
        engine.args["api_server_count"] = args.api_server_count
    gym.python, gym.model_servers, gym.start_timeout_s = (
        args.gym_python,
        args.model_servers,
        args.start_timeout_s,
    )
    env.replicas, env.max_output_tokens, env.timeout_s = args.replicas, args.tokens, args.deadline_s
    most = max(num_rollouts(args, n) for n in args.concurrency)
    env.data.train_size, env.data.validation_size = math.ceil(most / args.group), 1
    config.rollout.max_retries = 0
    return config


def num_rollouts(args: argparse.Namespace, concurrency: int) -> int:
    """Returns the number of rollouts of a round with this concurrency."""
    return max(concurrency * args.waves, MIN_ROLLOUTS)


async def measure(args: argparse.Namespace, report: Report, logs: Path) -> None:
    """Starts all processes as a run does, plays the rounds and ends all processes."""
    config = read_config(args)
    tokenizer = load_tokenizer(config.model.path)
    python = ensure_environments(config.gym, {ENV: config.env[ENV]}, cache_dir(), say)
    engine_sock = ports.reserve()
    gateways = [ports.listen() for _ in range(args.gateways)]
    sockets: dict[str, Any] = {}
    control = Control(ports.listen(), KEYS.run, lambda _: None)
    supervisor = control.supervisor = Supervisor(
        health_interval_s=config.gym.health_interval_s,
        health_timeout_s=config.gym.health_timeout_s,
        start_timeout_s=args.start_timeout_s,
        on_change=control.changed,
    )
    async with control:
        with ExitStack() as cleanup:
            try:
                url = args.engine_url or ports.url_of(engine_sock)
                if not args.engine_url:
                    start_vllm(supervisor, config, engine_sock.getsockname()[1], logs)
                start_gateways(supervisor, config, url, gateways, logs)
                layout = start_servers(supervisor, config, python, gateways, sockets, logs)
                tasks = await asyncio.to_thread(read_tasks, config, python)  # while the servers start
                await wait_ready(supervisor, args.start_timeout_s)
                report.versions = await asyncio.to_thread(read_versions, args, python)
                stack = Stack(
                    supervisor, layout, url.rstrip("/"), end_of_turn_ids(tokenizer), args.max_model_len
                )
                for number in args.concurrency:
                    env = dataclasses.replace(config.env[ENV], max_concurrency=number)
                    collector = Collector(
                        layout.replicas, {ENV: env}, config.rollout, report.model["vocab_size"], control.url
                    )
                    cleanup.callback(collector.close)
                    cleanup.callback(collector.stop)
                    stack.collectors[number] = collector
                playing = asyncio.create_task(play_rounds(args, stack, tasks, report))
                left = max(1.0, args.until - time.monotonic())
                await asyncio.wait(
                    {playing, supervisor.failed}, timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
                if (
                    playing.done() and playing.exception()
                ):  # the cause may be a server's end: wait for that error
                    await asyncio.wait({supervisor.failed}, timeout=5.0)
                if supervisor.failed.done():
                    playing.cancel()
                    supervisor.failed.result()
                if not playing.done():
                    playing.cancel()
                    raise TimeoutError(f"not done within {args.deadline_s:.0f} s (--deadline-s)")
                playing.result()
            finally:
                await asyncio.to_thread(
                    cleanup.close
                )  # in a thread, as the control endpoint must still answer
                await supervisor.close(["gateway-0"])
                for sock in (engine_sock, *gateways, *sockets.values()):
                    sock.close()


def read_tasks(config: RunConfig, python: Path) -> list[Task]:
    env = config.env[ENV]
    path = fetch(ENV, env, python, cache_dir(), say).train
    rows = load_rows(path, ENV, env.agent, server=server_of(env.config_path))
    return [Task(f"{ENV}/{i}", ENV, env.agent, row) for i, row in enumerate(rows)]


def read_versions(args: argparse.Namespace, gym_python: Path) -> dict[str, str]:
    own = facts.versions(sys.executable, ("aiohttp", "orjson", "transformers"))
    engine = facts.versions(args.engine_python or sys.executable, ("vllm", "torch"))
    return own | engine | facts.versions(gym_python, ("nemo_gym",))


async def play_rounds(args: argparse.Namespace, stack: Stack, tasks: list[Task], report: Report) -> None:
    began = time.monotonic()
    prompts = await warm_up(args, stack, tasks)
    say(f"warmed up in {time.monotonic() - began:.0f} s; prompts of {median_length(prompts):.0f} tokens")
    report.prompt_tokens = median_length(prompts)
    ways = ["direct", "stack", *(["direct, unseeded"] if args.unseeded else [])]
    took: dict[tuple[int, str], float] = {}
    for number in range(args.rounds):
        for concurrency in args.concurrency:
            batch = build_batch(args, concurrency, number, tasks, prompts)
            turn = number % len(ways)  # the rounds begin with different ways
            needed_s = sum(took.get((concurrency, way), 0.0) for way in ways)
            if needed_s * 1.2 + 5.0 > args.until - time.monotonic():
                report.left_out.append(f"round {number + 1} with {concurrency} in flight")
                continue
            for way in ways[turn:] + ways[:turn]:
                began = time.monotonic()
                entry = await measure_one(stack, batch, concurrency, way)
                took[concurrency, way] = time.monotonic() - began
                report.entries.append({"round": number + 1, "concurrency": concurrency, "way": way} | entry)
                report.write()
                batch_size = entry["tokens_per_engine_step"]
                say(
                    f"round {number + 1}  {concurrency:>5} in flight  {way:<18}"
                    f"{entry['tokens_per_s']:>9.0f} tokens/s in {entry['seconds']:.1f} s"
                    + (f", {batch_size:.1f} a step" if batch_size else "")
                    + (f"  short {entry['short']}" if entry["short"] else "")
                    + (f"  failed {entry['failed']}" if entry["failed"] else "")
                )


async def warm_up(args: argparse.Namespace, stack: Stack, tasks: list[Task]) -> list[list[int]]:
    """Plays both ways once, with short replies and the highest concurrency; returns the tasks' prompt ids."""
    most = max(args.concurrency)
    samplings = [Sampling(temperature=1.0, max_output_tokens=16, seed=seed) for seed in range(len(tasks))]
    outcomes = await asyncio.to_thread(stack.collectors[most].collect, tasks, samplings)
    failed = [o for o in outcomes if isinstance(o, Failed)]
    if failed:
        raise GymexpError(f"{len(failed)} of {len(outcomes)} rollouts failed: {failed[0].detail[:1000]}")
    prompts = [o.rollout.turns[0].prompt_ids for o in outcomes if not isinstance(o, Failed)]
    indices = range(most)
    batch = Batch(
        [tasks[i % len(tasks)] for i in indices],
        [prompts[i % len(tasks)] for i in indices],
        [Sampling(temperature=1.0, max_output_tokens=16, seed=seed) for seed in indices],
    )
    for play in (stack.play_directly, stack.play):
        count = await play(batch, most)
        if count.failed:
            raise GymexpError(f"{count.failed} of {most} requests failed in the warm-up")
    return prompts


def build_batch(
    args: argparse.Namespace, concurrency: int, number: int, tasks: list[Task], prompts: list[list[int]]
) -> Batch:
    rollouts = range(num_rollouts(args, concurrency))
    draw = random.Random(f"{number}/{concurrency}")
    samplings = []
    for _ in rollouts:
        length = round(args.tokens * draw.uniform(1 - args.spread, 1 + args.spread))
        num, seed = max(1, length), draw.getrandbits(31)
        samplings.append(Sampling(temperature=1.0, max_output_tokens=num, seed=seed))
    rows = [i // args.group % len(tasks) for i in rollouts]
    return Batch([tasks[i] for i in rows], [prompts[i] for i in rows], samplings)


async def measure_one(stack: Stack, batch: Batch, concurrency: int, way: str) -> dict[str, Any]:
    await stack.empty_cache()
    processes, steps = stack.processes(), await stack.engine_steps()
    before, began = [cpu_seconds(process) for _, process in processes], time.perf_counter()
    if way == "stack":
        count = await stack.play(batch, concurrency)
    else:
        count = await stack.play_directly(batch, concurrency, seeded=way == "direct")
    seconds = time.perf_counter() - began
    steps_after = await stack.engine_steps()
    num_steps = steps_after - steps if steps is not None and steps_after is not None else 0
    cpu_ms, busiest = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    for (kind, process), start in zip(processes, before, strict=True):
        used = max(0.0, cpu_seconds(process) - start)
        cpu_ms[kind] += 1e3 * used / len(batch.tasks)
        busiest[kind] = max(busiest[kind], used / seconds)
    return {
        "rollouts": len(batch.tasks),
        "seconds": seconds,
        "tokens_per_s": count.tokens / seconds,
        "tokens_per_engine_step": count.tokens / num_steps if num_steps else None,
        **dataclasses.asdict(count),
        "cpu_ms_per_rollout": cpu_ms,
        "busiest": busiest,
    }


def median_length(prompts: list[list[int]]) -> float:
    return statistics.median(map(len, prompts))


class Report:
    """The measurements so far, as JSON and as a table."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = facts.model(args.model)
        self.machine = facts.machine()
        self.entries: list[dict[str, Any]] = []
        self.versions: dict[str, str] = {}
        self.prompt_tokens = 0.0
        self.error = ""
        self.left_out: list[str] = []  # for lack of time

    def of(self, concurrency: int, way: str) -> dict[int, dict[str, Any]]:
        """Returns the measurements of one concurrency and way, by round."""
        key = (concurrency, way)
        return {e["round"]: e for e in self.entries if (e["concurrency"], e["way"]) == key}

    def summary(self) -> list[dict[str, Any]]:
        """Returns medians for each concurrency and way. Ratios are to "direct" of the same round."""
        lines = []
        for concurrency in self.args.concurrency:
            direct = self.of(concurrency, "direct")
            for way in ("direct", "stack", "direct, unseeded"):
                rounds = self.of(concurrency, way)
                if not rounds:
                    continue
                both = [n for n in rounds if n in direct]
                ratios = [rounds[n]["tokens_per_s"] / direct[n]["tokens_per_s"] for n in both]
                lines.append(
                    {
                        "concurrency": concurrency,
                        "way": way,
                        "tokens_per_s": statistics.median(e["tokens_per_s"] for e in rounds.values()),
                        "ratio": statistics.median(ratios) if ratios else None,
                        "round_ratios": ratios,
                        "cpu_ms_per_rollout": self._medians(rounds, "cpu_ms_per_rollout"),
                        "busiest": self._medians(rounds, "busiest"),
                    }
                )
        return lines

    def _medians(self, rounds: dict[int, dict[str, Any]], name: str) -> dict[str, float]:
        return {kind: round(statistics.median(e[name][kind] for e in rounds.values()), 3) for kind in KINDS}

    def write(self) -> None:
        args = self.args
        left_out = ("until", "model", "output", "logs", "gym_python", "engine_python", "engine_url")
        arguments = {name: value for name, value in vars(args).items() if name not in left_out}
        results = {
            "machine": self.machine,
            "versions": self.versions,
            "model": self.model,
            "arguments": arguments,
            "prompt_tokens": self.prompt_tokens,
            "error": self.error or None,
            "left_out": self.left_out,
            "results": self.summary(),
            "measurements": self.entries,
        }
        facts.write(args.output, results)

    def complaints(self) -> list[str]:
        """Returns the problems that make the comparison worthless."""
        problems = [self.error] if self.error else []
        for e in self.entries:
            where = f"round {e['round']}, {e['concurrency']} in flight, {e['way']}"
            if e["failed"] or e["other_prompts"]:
                problems.append(f"{where}: {e['failed']} failed, {e['other_prompts']} had another prompt")
        return problems

    def show(self) -> None:
        print(f"\nCPU: ms a rollout / share of a core of the busiest, of {', '.join(KINDS)}")
        print(f"{'in flight':>9}  {'':<18}{'tokens/s':>9}{'ratio':>7}{'target':>7}   CPU")
        for line in self.summary():
            ratio = f"{line['ratio']:.3f}" if line["ratio"] else ""
            target = TARGETS.get(line["concurrency"], "") if line["way"] == "stack" else ""
            cpu = "  ".join(
                f"{line['cpu_ms_per_rollout'][kind]:.1f}/{line['busiest'][kind]:.2f}" for kind in KINDS
            )
            print(
                f"{line['concurrency']:>9}  {line['way']:<18}{line['tokens_per_s']:>9.0f}{ratio:>7}"
                f"{target:>7}   {cpu}"
            )
        if self.left_out:
            print(f"left out for lack of time (--deadline-s): {', '.join(self.left_out)}")
        short = sum(e["short"] for e in self.entries)
        if short:
            print(f"{short} replies did not have the requested length: the ways did not do the same work")
        print(
            f"{self.machine['cores']} cores, {' '.join(self.machine['gpus']) or 'no GPU'}: {self.args.output}"
        )


if __name__ == "__main__":
    main()
