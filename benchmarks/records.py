"""Measures the share of a step that the records take, and how fast one rollout of many is read.

    python benchmarks/records.py [--run DIR] [--rollouts 64] [--tokens 4000] [--step-s 46] [--read 10000]

Records are the files of rollouts, their indexes, what the trainer made of each rollout (the sidecar), the
spans, and system.jsonl. The script needs CPUs only. It has three parts:

* **A real step.** It trains the tiny policy for a few steps (`gymexp.train env=[sudoku]`) and reads the time
  of a step from metrics.jsonl. In its own process it then writes the records of the same rollouts again, and
  measures a line of system.jsonl with twelve idle services. --run uses a finished run instead.
* **A large step.** It writes the records of --rollouts rollouts of --tokens sampled tokens, with the
  trainer's log-probabilities and weights of each token, and divides by --step-s, the seconds of a step. The
  default is what 64 rollouts of 1,024 tokens took with a 4B model on two H200 (README.md), so a quarter of
  these tokens.
* **Reading.** It reads one of --read rollouts by its index, and parses all of them as a reader without an
  index would have to. The files are copies of one with 64 rollouts.

Token ids are random below 151,936, and log-probabilities are logarithms of random numbers, so both compress
worse than a policy's. Times are CPU seconds of this process, each the median of several rounds: wall-clock
seconds of a busy machine say little. The seconds of a step are by the wall clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from facts import RESULTS, machine, versions, write

from gymexp.config.schema import EnvConfig
from gymexp.files import append_line, read_lines
from gymexp.rollout.outcome import Completed, Outcome, Rollout, Task, Turn, outcome_from_json
from gymexp.rollout.rollout_files import (
    RolloutWriter,
    read_index,
    read_names,
    read_outcome,
    read_outcomes,
    read_train_index,
    read_trained,
)
from gymexp.run.system_records import INTERVAL_S, Gpus, ProcessUse
from gymexp.training.trained_values import Row, trained_of

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 151_936
GROUP = 8
ROUNDS = 5
SPANS = 8  # of a step: rollout, sync, logprobs, update, and the parts into which they divide each other
SERVICES = 12
ENVS = {"e": EnvConfig("c", "a")}
# Of a verifier that answers with much: the index takes twelve of its fields.
VERDICT = {f"field_{n}": n for n in range(12)} | {"is_correct": True, "judge_output": "word " * 2_000}


def seconds_of(work: Callable[[], Any]) -> float:
    """Returns the CPU seconds that `work` takes in this process: the median of ROUNDS rounds."""
    spent = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return median(spent)


def made_up(count: int, tokens: int, draw: random.Random) -> list[Outcome]:
    """Returns rollouts of one turn, with `tokens` sampled tokens after a prompt of 500."""
    outcomes: list[Outcome] = []
    for number in range(count):
        ids = [draw.randrange(VOCABULARY) for _ in range(tokens)]
        logprobs = [math.log(1 - draw.random()) for _ in ids]
        turn = Turn([draw.randrange(VOCABULARY) for _ in range(500)], ids, logprobs)
        items = [{"type": "message", "content": "word " * tokens}]
        task = Task(f"e/{number // GROUP}", "e", "a", {})
        outcomes.append(Completed(Rollout(task, [turn], 1.0, items, verdict=VERDICT)))
    return outcomes


def batch_of(outcomes: list[Outcome]) -> dict[str, torch.Tensor]:
    """Returns the rollouts as TRL returns them to the trainer, with all that it may compute."""
    turns = [outcome.rollout.turns[-1] for outcome in outcomes if isinstance(outcome, Completed)]
    width = max(len(turn.completion_ids) for turn in turns)
    mask = torch.zeros(len(turns), width)
    logprobs = torch.zeros(len(turns), width)
    for i, turn in enumerate(turns):
        mask[i, : len(turn.logprobs)] = 1
        logprobs[i, : len(turn.logprobs)] = torch.tensor(turn.logprobs)
    noise = torch.randn(logprobs.shape) / 100
    return {
        "completion_mask": mask,
        "advantages": torch.randn(len(turns)),
        "old_per_token_logps": logprobs + noise,
        "sampling_per_token_logps": logprobs,
        "importance_sampling_ratio": noise.exp(),
    }


def parts_of_a_step(outcomes: list[Outcome], system_lines: float) -> dict[str, float]:
    """Returns the seconds that each kind of record takes in a step. system_lines: their number a step."""
    batch = batch_of(outcomes)
    turns = [outcome.rollout.turns[-1] for outcome in outcomes if isinstance(outcome, Completed)]
    rows = [Row(len(turn.completion_ids), True, True) for turn in turns]
    span = {"time": time.time(), "seconds": 1.0, "span": "update", "step": 1}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        writer = RolloutWriter(directory, ENVS)
        use = ProcessUse()
        wait = [sys.executable, "-c", "input()"]
        idle = [
            subprocess.Popen(wait, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(SERVICES)
        ]
        services = {"controller": os.getpid()} | {str(process.pid): process.pid for process in idle}

        def measure_system() -> None:
            figures = {"processes": use.measure(services), "gpus": Gpus([]).measure()}
            append_line(directory / "system.jsonl", figures)

        def note_spans() -> None:
            for _ in range(SPANS):
                append_line(directory / "timeline.jsonl", span)

        parts = {
            "rollouts_and_index_s": seconds_of(lambda: writer.write("step-000001", outcomes, GROUP)),
            "sidecar_s": seconds_of(
                lambda: writer.write_trained("step-000001", trained_of(batch, rows), GROUP)
            ),
            "spans_s": seconds_of(note_spans),
            "system_s": seconds_of(measure_system) * system_lines,
            "bytes": float(sum(path.stat().st_size for path in directory.iterdir())),
        }
        for process in idle:
            process.communicate()
        return parts


def share(parts: dict[str, float], step_s: float) -> dict[str, float]:
    """Returns the parts with their sum and its share of a step of `step_s` seconds."""
    total = sum(seconds for name, seconds in parts.items() if name.endswith("_s"))
    return parts | {"step_s": step_s, "records_s": total, "share": total / step_s}


def train(directory: Path) -> None:
    """Trains the tiny policy for four steps."""
    command = [sys.executable, "-m", "gymexp.train", "env=[sudoku]", f"output_dir={directory}"]
    command += ["trainer.max_steps=4", "evaluation.before=false", "evaluation.after=false"]
    subprocess.run(command, check=True, cwd=ROOT)


def real_step(run: Path) -> dict[str, float]:
    """Returns the share of the records in the median step of a run, without its first step."""
    logs = [entry for entry in read_lines(run / "metrics.jsonl") if "time/step" in entry]
    step_s = median(entry["time/step"] for entry in logs[1:] or logs)
    file = run / "rollouts" / f"{read_names(run / 'rollouts')[-1]}.jsonl.zst"
    outcomes = [outcome_from_json(record) for record in read_outcomes(file)]
    as_e = [
        Completed(dataclasses.replace(o.rollout, task=Task(o.rollout.task.key, "e", "a", {})))
        for o in outcomes
        if isinstance(o, Completed)
    ]
    sizes = {"rollouts": float(len(as_e))}
    return sizes | share(parts_of_a_step(list(as_e), system_lines=step_s / INTERVAL_S), step_s)


def reading(count: int, tokens: int) -> dict[str, float]:
    """Returns the seconds to read one rollout of `count` by its index, and to parse them all (extrapolated
    from 256)."""
    outcomes = made_up(64, tokens, random.Random(0))
    trained = trained_of(batch_of(outcomes), [Row(tokens, True, True)] * len(outcomes))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        writer = RolloutWriter(directory, ENVS)
        writer.write("step-000001", outcomes, GROUP)
        writer.write_trained("step-000001", trained, GROUP)
        for step in range(2, math.ceil(count / 64) + 1):
            for path in directory.glob("step-000001.*"):
                shutil.copy(path, directory / path.name.replace("000001", f"{step:06d}"))
        for index in directory.glob("*index.jsonl"):
            text = index.read_text()
            steps = range(1, math.ceil(count / 64) + 1)
            index.write_text("".join(text.replace("step-000001", f"step-{step:06d}") for step in steps))
        rows, trained_rows = read_index(directory), read_train_index(directory)
        draw = random.Random(1)

        def parse_some() -> int:
            files = [directory / f"step-{step + 1:06d}.jsonl.zst" for step in range(4)]
            return sum(len(list(read_outcomes(path))) for path in files)

        one_s = seconds_of(lambda: read_outcome(directory, draw.choice(rows)))
        all_s = seconds_of(parse_some) / 256 * len(rows)
        return {
            "rollouts": float(len(rows)),
            "index_s": seconds_of(lambda: read_index(directory)),
            "one_s": one_s,
            "one_trained_s": seconds_of(lambda: read_trained(directory, draw.choice(trained_rows))),
            "all_s": all_s,
            "all_against_one": all_s / one_s,
            "bytes": float(sum(path.stat().st_size for path in directory.iterdir())),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run; else the script trains one")
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4_000)
    parser.add_argument("--step-s", type=float, default=46.0)
    parser.add_argument("--read", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=RESULTS / "records_2_cores.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        run = args.run or Path(name) / "run"
        if args.run is None:
            train(run)
        real = real_step(run)
    large = made_up(args.rollouts, args.tokens, random.Random(0))
    sizes = {"rollouts": args.rollouts, "tokens": args.tokens}
    results = {
        "machine": machine(),
        "versions": versions(sys.executable, ["torch", "trl", "orjson", "zstandard", "psutil"]),
        "real_step": real,
        "large_step": sizes | share(parts_of_a_step(large, args.step_s / INTERVAL_S), args.step_s),
        "reading": {"tokens": args.tokens} | reading(args.read, args.tokens),
        "load": os.getloadavg(),
    }
    write(args.output, results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
