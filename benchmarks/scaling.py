"""Measures the constants of docs/scaling.md: the work of lead and rank 0 per rollout, rank and checkpoint.

    python benchmarks/scaling.py [--ranks 2 64] [--rollout-ranks 4] [--write-mb 512] [--directory DIR]

It needs CPUs only, and takes seconds. Rollouts are made up of random ids below 151,936 and of logarithms of
random numbers, which compress worse than the samples of a policy. --directory names the file system to write
to. "to_ranks" compares two ways of rollouts to the ranks that train on them: each rank gets its own part, as
in a run, or all outcomes are broadcast to every rank. "elsewhere" is the CPU time that rank 0 would still
need for a rollout if a pool of processes, which a run does not have, parsed and checked the replies: a reply
goes to the pool as bytes, and its outcome comes back whole, or packed with its items, or not at all.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import orjson
from facts import RESULTS, machine, versions, write
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from gymexp.config.schema import EnvConfig
from gymexp.processes.ports import listen
from gymexp.rollout.outcome import Task
from gymexp.rollout.packed import pack, unpack
from gymexp.rollout.play import read_reply
from gymexp.rollout.rollout_files import RolloutWriter
from gymexp.training.ranks import on_main_rank, part_of_main_rank

VOCABULARY = 151_936
# name: tokens of the first prompt, turns, tokens sampled per turn, tokens added between turns
SHAPES = {"one turn": (200, 1, 1024, 0), "three turns": (3000, 3, 340, 100)}
ROUNDS = 5
GROUP = 8  # rollouts of a task, which share a frame


def reply_of(shape: tuple[int, int, int, int], draw: random.Random) -> bytes:
    """Returns the reply of an agent's /run. As in NeMo Gym's replies, each turn has its whole prompt."""
    first, turns, sampled, added = shape
    prompt, items = [draw.randrange(VOCABULARY) for _ in range(first)], []
    for _ in range(turns):
        ids = [draw.randrange(VOCABULARY) for _ in range(sampled)]
        logprobs = [math.log(1 - draw.random()) for _ in ids]
        tokens = {"prompt_token_ids": prompt, "generation_token_ids": ids, "generation_log_probs": logprobs}
        content = [{"type": "output_text", "text": "word " * sampled}]
        items.append({"type": "message", "role": "assistant", "content": content} | tokens)
        prompt = prompt + ids + [draw.randrange(VOCABULARY) for _ in range(added)]
    return orjson.dumps({"reward": 1.0, "response": {"output": items}})


def seconds_of(work: Callable[[], Any]) -> float:
    """Returns the CPU seconds that `work` takes in this process: the median of ROUNDS rounds."""
    spent = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return median(spent)


def rollouts(count: int = 64) -> dict[str, Any]:
    """Returns the bytes and CPU milliseconds per rollout, for each shape."""
    results = {}
    for name, shape in SHAPES.items():
        draw = random.Random(0)
        replies = [reply_of(shape, draw) for _ in range(count)]
        task = Task("e/000000", "e", "a", {})

        def read(replies: list[bytes] = replies, task: Task = task) -> list[Any]:
            return [read_reply(task, orjson.loads(reply), VOCABULARY, 1.0) for reply in replies]

        outcomes = read()

        directory = Path(tempfile.mkdtemp())

        def save(outcomes: list[Any] = outcomes, directory: Path = directory) -> int:
            RolloutWriter(directory, {"e": EnvConfig("c", "a")}).write("step-000001", outcomes, GROUP)
            return sum(path.stat().st_size for path in directory.iterdir())

        def packed(outcomes: list[Any] = outcomes) -> bytes:
            return pickle.dumps(pack(outcomes))

        data, whole = packed(), pickle.dumps(outcomes)
        results[name] = {
            "shape": dict(zip(("prompt", "turns", "sampled", "added"), shape, strict=True)),
            "reply_bytes": sum(map(len, replies)) / count,
            "file_bytes": save() / count,
            "packed_bytes": len(data) / count,
            "pickle_bytes": len(whole) / count,
            "read_ms": seconds_of(read) / count * 1e3,
            "file_ms": seconds_of(save) / count * 1e3,
            "pack_ms": seconds_of(packed) / count * 1e3,
            "unpack_ms": seconds_of(lambda data=data: unpack(pickle.loads(data))) / count * 1e3,
            "pickle_ms": seconds_of(lambda of=outcomes: pickle.dumps(of)) / count * 1e3,
            "unpickle_ms": seconds_of(lambda whole=whole: pickle.loads(whole)) / count * 1e3,
        }
    return results


def elsewhere(count: int = 64) -> dict[str, float]:
    """Returns rank 0's CPU milliseconds per rollout of three turns, for each form of what comes back."""
    draw = random.Random(0)
    replies = [reply_of(SHAPES["three turns"], draw) for _ in range(count)]
    results = {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        for name, parse in (("whole", _whole), ("packed", _packed), ("nothing", _nothing)):

            def play(parse: Callable[[bytes], Any] = parse, name: str = name) -> list[Any]:
                back = [future.result() for future in [pool.submit(parse, reply) for reply in replies]]
                return unpack([one for [one], _ in back]) if name == "packed" else back

            play()  # so that the processes are there
            results[f"{name}_ms"] = seconds_of(play) / count * 1e3
    return results


def _whole(reply: bytes) -> Any:
    return read_reply(Task("e/000000", "e", "a", {}), orjson.loads(reply), VOCABULARY, 1.0)


def _packed(reply: bytes) -> Any:
    outcome = _whole(reply)
    return pack([outcome]), outcome.rollout.items


def _nothing(reply: bytes) -> None:
    _whole(reply)


def to_ranks(ranks: int, of_each: int = 32) -> dict[str, Any]:
    """Returns the seconds until all ranks of this machine have their rollouts of three turns, and the CPU
    seconds of the first rank and of another, for both ways. of_each: rollouts of a rank."""
    draw, task = random.Random(0), Task("e/000000", "e", "a", {})
    replies = [orjson.loads(reply_of(SHAPES["three turns"], draw)) for _ in range(ranks * of_each)]
    outcomes = [read_reply(task, reply, VOCABULARY, 1.0) for reply in replies]
    parts = [outcomes[at : at + of_each] for at in range(0, len(outcomes), of_each)]
    with listen() as free:
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    answers: Any = fork.Queue()
    started = [fork.Process(target=_receive, args=(rank, port, parts, answers)) for rank in range(ranks)]
    for one in started:
        one.start()
    by_rank = dict(answers.get(timeout=300) for _ in started)
    for one in started:
        one.join()
    named = {
        way: {
            "wall_s": max(of_rank[way][0] for of_rank in by_rank.values()),
            "first_rank_cpu_s": by_rank[0][way][1],
            "other_rank_cpu_s": by_rank[ranks - 1][way][1],
        }
        for way in ("own part", "all to all")
    }
    return {"ranks": ranks, "rollouts_of_each": of_each} | named


def _receive(rank: int, port: int, parts: list[list[Any]], answers: Any) -> None:
    """Is one of the ranks. Puts (rank, {way: (median seconds, median CPU seconds)})."""
    import torch
    from accelerate.state import PartialState

    size = len(parts)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in variables.items()}
    torch.set_num_threads(1)
    state: Any = PartialState(cpu=True)

    def own_part() -> Any:
        return part_of_main_rank(state, lambda: parts, pack, unpack)

    def all_to_all() -> Any:
        return on_main_rank(state, lambda: parts)[rank]

    seconds = {}
    for name, way in (("own part", own_part), ("all to all", all_to_all)):
        rounds = []
        for _ in range(ROUNDS):
            torch.distributed.barrier()
            began, cpu = time.monotonic(), time.process_time()
            assert len(way()) == len(parts[rank])
            rounds.append((time.monotonic() - began, time.process_time() - cpu))
        seconds[name] = tuple(median(column) for column in zip(*rounds, strict=True))
    answers.put((rank, seconds))
    answers.close()
    answers.join_thread()


def _join(port: int, ranks: int) -> None:
    TCPStore("127.0.0.1", port, ranks, False, timedelta(seconds=60))


def rendezvous(ranks: int) -> float:
    """Returns the seconds until all ranks have met at a TCP store.

    The ranks are processes of this machine, forked after the import of torch.
    """
    with listen() as free:
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=_join, args=(port, ranks)) for _ in range(ranks - 1)]
    began = time.monotonic()
    for other in others:
        other.start()
    TCPStore("127.0.0.1", port, ranks, True, timedelta(seconds=60))
    spent = time.monotonic() - began
    for other in others:
        other.join()
    return spent


def written(directory: Path, megabytes: int) -> float:
    """Returns the bytes per second of a file write, fsync included."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        began = time.monotonic()
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return megabytes * 2**20 / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 64])
    parser.add_argument("--rollout-ranks", type=int, default=4)
    parser.add_argument("--write-mb", type=int, default=512)
    parser.add_argument("--directory", type=Path, default=Path.cwd())
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling_2_cores.json")
    args = parser.parse_args()
    results = {
        "machine": machine(),
        "versions": versions(sys.executable, ["torch", "orjson", "zstandard"]),
        "rollouts": rollouts(),
        "elsewhere": elsewhere(),
        "to_ranks": to_ranks(args.rollout_ranks),
        "rendezvous_s": {str(ranks): rendezvous(ranks) for ranks in args.ranks},
        "written_bytes_per_s": written(args.directory, args.write_mb),
        "load": os.getloadavg(),
    }
    write(args.output, results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
