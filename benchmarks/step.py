"""Measures the parts of a training step, in seconds, in a short run of gymexp.

    python benchmarks/make_model.py outputs/model_4b --size 4b
    python benchmarks/step.py --model outputs/model_4b [--train-gpus 1] [-- engine.args.max_num_seqs=256 …]
    python benchmarks/step.py --model outputs/model_4b --ways before ahead           both, and their ratio

A way is one run. `before` plays and trains in turn, pads, makes a pass for old log-probabilities, and
computes all layers again; `in_turn` has gymexp's defaults; `ahead` overlaps (`overlap.*`, by --lead) and
packs (`model.packing=tree`, with --packed-micro-batch). The ratio is that of the mean seconds of their
measured steps; before these, the queue of `ahead` fills for `lead` further steps.

The script runs `python -m gymexp.train engine=vllm` with this model, reads metrics.jsonl (`time/*`) and the
rollouts, and ends the run after the last step to measure, without a checkpoint. It leaves out the first
`--warm-up` steps: in the first step vLLM and the trainer see every shape for the first time, and the first
transfer of weights comes before the second step. Arguments after `--` are overrides of the run; they come
after this script's own.

With a model of make_model.py every reply has `--tokens` tokens and calls no tool. The learning rate is so low
that the policy stays what it is, but the work is the same.

MFU, model FLOP/s utilization (PaLM, https://arxiv.org/abs/2204.02311, appendix B), is the FLOPs per second
that the update needs, divided by the peak FLOP/s of the training GPUs. The update needs these FLOPs:

    6 * N * tokens                                  the weights, forward and backward
    12 * layers * heads * head_dim * sum(length^2)  attention: 12 * layers * heads * head_dim * length a token

N: parameters, with the embedding only as the output head. heads * head_dim is the hidden size in most models,
not in Qwen3-4B. length: prompt and generation of a rollout; tokens: sum(length), without padding. The count
leaves out what gradient checkpointing computes again, and does not deduct the causal mask. `mfu` divides by
time/update and time/other: work on a GPU is asynchronous, and `other` contains the wait for the end of the
last backward pass, for clipping and for the optimizer's step. `mfu_update` divides by time/update alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import facts

from gymexp.cluster.placement import visible_gpus
from gymexp.rollout.rollout_files import read_outcomes

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("rollout", "sync", "logprobs", "update", "other")
PEAK_FLOPS = 989e12  # H100 and H200, bfloat16, dense
PACKAGES = ("torch", "transformers", "trl", "vllm", "accelerate")
OF_OVERLAP = ("idle/trainer", "idle/engine", "staleness/mean", "staleness/max", "overlap/turns_cut")
POLL_S = 0.5


WAYS = ("before", "in_turn", "ahead")


def main() -> None:
    args = parse(__doc__ or "", ["in_turn"], facts.RESULTS / "step.json")
    with ExitStack() as stack:
        if args.run_dir is None:
            args.run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        results = measure(args)
    sys.exit(1 if any(report.error for report in results.reports) else 0)


def measure(args: argparse.Namespace) -> Results:
    """Makes a run of each way, beside `args.run_dir`, and writes the results."""
    results = Results(args)
    for way in args.ways:
        args.until = time.monotonic() + args.deadline_s
        report = results.begin(way)
        report.error = run(args, report, results)
        results.write()
        report.show()
    results.show()
    return results


def parse(about: str, ways: list[str], output: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="a model directory, e.g. of make_model.py")
    parser.add_argument("--env", nargs="+", default=["sudoku", "workplace"])
    parser.add_argument("--steps", type=int, default=3, help="number of steps to measure")
    parser.add_argument("--warm-up", type=int, default=1, help="number of steps before the measured ones")
    parser.add_argument("--rollouts", type=int, default=64, help="rollouts per step")
    parser.add_argument("--group", type=int, default=16, help="rollouts per task")
    parser.add_argument("--micro-batch", type=int, default=4, help="rollouts per GPU in one pass")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per reply")
    parser.add_argument("--max-model-len", type=int, default=16_384)
    parser.add_argument("--train-gpus", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=ways)
    parser.add_argument("--lead", type=int, default=1, help="batches that `ahead` plays ahead")
    parser.add_argument("--packed-micro-batch", type=int, default=16, help="of `ahead`, as --micro-batch")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm", help="hf to try this on a CPU")
    parser.add_argument("--gym-python", help="an interpreter that has nemo_gym; default: gymexp's own venv")
    parser.add_argument("--engine-python", help="an interpreter that has vLLM; default: this one")
    parser.add_argument("--peak-flops", type=float, help=f"of a GPU per second; with GPUs {PEAK_FLOPS:g}")
    parser.add_argument("--deadline-s", type=float, default=540.0, help="of each way")
    parser.add_argument(
        "--run-dir", type=Path, help="the directory to keep the run in; default: a temporary one"
    )
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("overrides", nargs="*", help="overrides of the run, after --")
    args = parser.parse_args()
    for size in {micro_batch_of(args, way) for way in args.ways}:
        if args.rollouts % (size * args.train_gpus) or args.rollouts % args.group:
            parser.error("--rollouts must be a multiple of --group, and of a micro-batch times --train-gpus")
    if not (args.model / "config.json").exists():
        parser.error(f"--model must be a model directory, {args.model} has no config.json")
    if args.peak_flops is None and visible_gpus():
        args.peak_flops = PEAK_FLOPS
    return args


def micro_batch_of(args: argparse.Namespace, way: str) -> int:
    return args.packed_micro_batch if way == "ahead" else args.micro_batch


def warm_up_of(args: argparse.Namespace, way: str) -> int:
    return args.warm_up + (args.lead if way == "ahead" else 0)


def overrides(args: argparse.Namespace, way: str, run_dir: Path) -> list[str]:
    micro_batch, warm_up = micro_batch_of(args, way), warm_up_of(args, way)
    words = [
        f"env=[{','.join(args.env)}]",
        f"engine={args.engine}",
        "model=qwen3_4b",
        "model.name=benchmark",
        f"model.path='{args.model.resolve()}'",
        f"model.max_model_len={args.max_model_len}",
        f"hydra.run.dir='{run_dir.resolve()}'",
        "evaluation.before=false",
        "evaluation.after=false",
        "rollout.max_drift=1.0",  # random weights of many layers cause more rounding error than trained ones
        "trainer.learning_rate=1e-12",  # a policy that changes would begin to sample ids that it must not
        # The groups of the last steps have none behind them, so these are not measured.
        f"trainer.max_steps={warm_up + args.steps + (args.lead if way == 'ahead' else 0)}",
        f"trainer.num_generations={args.group}",
        f"trainer.per_device_train_batch_size={micro_batch}",
        f"trainer.gradient_accumulation_steps={args.rollouts // (micro_batch * args.train_gpus)}",
        f"engine.start_timeout_s={args.deadline_s:.0f}",
        f"gym.start_timeout_s={args.deadline_s:.0f}",
    ]
    if way == "before":
        words += ["rollout.correction=decoupled", "model.packing=none"]
        words.append("trainer.gradient_checkpointing_kwargs={every_n_layers: 1}")
    elif way == "ahead":
        words += [
            f"overlap.lead={args.lead}",
            f"overlap.max_staleness={max(4, args.lead)}",
            "model.packing=tree",
        ]
    num_tasks = args.rollouts // args.group * (warm_up + args.steps + args.lead)
    for name in args.env:
        words += [
            f"env.{name}.max_output_tokens={args.tokens}",
            f"env.{name}.max_concurrency={args.rollouts * (args.lead + 2)}",
            f"env.{name}.data.source=generate",
            f"env.{name}.data.train_size={max(num_tasks, 8)}",
            f"env.{name}.data.validation_size=1",
        ]
    if len(visible_gpus()) > args.train_gpus:  # without further GPUs, the training GPUs sample as well
        words.append(f"placement.train_gpus={args.train_gpus}")
    for key, python in (("gym.python", args.gym_python), ("engine.python", args.engine_python)):
        if python:
            words.append(f"{key}='{python}'")
    return words + args.overrides


def run(args: argparse.Namespace, report: Report, results: Results) -> str:
    """Trains until the last step to measure is logged; returns an error message, or "" if all went well."""
    run_dir = args.run_dir.with_name(f"{args.run_dir.name}_{report.way}")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    output = run_dir.with_name(run_dir.name + ".txt")
    num_steps = report.warm_up + args.steps
    command = [sys.executable, "-m", "gymexp.train", *overrides(args, report.way, run_dir)]
    paths = ("model.path", "hydra.", "gym.python", "engine.python")
    report.overrides = [o for o in command[3:] if not o.startswith(paths)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")}
    with output.open("w") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
    phase, began = "", time.monotonic()
    try:
        while True:
            ended = process.poll() is not None
            if (now := phase_of(run_dir)) != phase:
                phase = now
                print(f"{report.way}, {time.monotonic() - began:4.0f} s: {phase}", flush=True)
            if report.read(run_dir):
                results.write()
            if len(report.steps) >= num_steps:
                del report.steps[num_steps:]
                return ""
            if ended:
                return f"the run ended with {process.returncode}:\n{output.read_text()[-3000:]}"
            if time.monotonic() > args.until:
                return (
                    f"{len(report.steps)} of {num_steps} steps within "
                    f"{args.deadline_s:.0f} s (--deadline-s). Its output:\n{output.read_text()[-1500:]}"
                )
            time.sleep(POLL_S)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the run and all its processes, at once and without a checkpoint: two signals ask for that."""
    for _ in range(2):
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(1.0)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def phase_of(run_dir: Path) -> str:
    try:
        status = json.loads((run_dir / "status.json").read_text())
    except (OSError, ValueError):
        return "prepare"
    starting = [n for n, state in status.get("services", {}).items() if state == "starting"]
    return f"{status.get('phase')}" + (f" (starting: {' '.join(starting)})" if starting else "")


class Results:
    """The measurements of all ways, as JSON."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = facts.model(args.model)
        self.machine = facts.machine()
        self.reports: list[Report] = []
        self.versions = facts.versions(sys.executable, PACKAGES)
        if args.engine_python:
            self.versions |= facts.versions(args.engine_python, ("vllm",))

    def begin(self, way: str) -> Report:
        self.reports.append(Report(self.args, way, self.model))
        return self.reports[-1]

    def ratios(self) -> dict[str, float]:
        """The mean step of each way, as a share of the first one's."""
        means = {report.way: report.mean_step() for report in self.reports}
        first = means[self.reports[0].way]
        return {way: mean / first for way, mean in means.items() if mean and first}

    def write(self) -> None:
        left_out = ("until", "model", "output", "run_dir", "gym_python", "engine_python", "overrides")
        arguments = {name: value for name, value in vars(self.args).items() if name not in left_out}
        common = {"machine": self.machine, "versions": self.versions, "model": self.model}
        ways = {
            report.way: {
                "overrides": report.overrides,
                "error": report.error or None,
                "results": report.summary(),
                "steps": report.steps,
            }
            for report in self.reports
        }
        facts.write(
            self.args.output, common | {"arguments": arguments, "ratios": self.ratios(), "ways": ways}
        )

    def show(self) -> None:
        for way, ratio in list(self.ratios().items())[1:]:
            print(f"a step of {way} takes {ratio:.3f} of one of {self.reports[0].way}")
        print(self.args.output)


class Report:
    """The measurements of a way's steps so far."""

    def __init__(self, args: argparse.Namespace, way: str, model: dict[str, Any]) -> None:
        self.args = args
        self.way = way
        self.warm_up = warm_up_of(args, way)
        self.model = model
        self.steps: list[dict[str, Any]] = []
        self.overrides: list[str] = []
        self.error = ""

    def read(self, run_dir: Path) -> bool:
        """Reads the steps that the run has logged since the last call, and prints them. Returns whether there
        are any."""
        path = run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        logged = [json.loads(line) for line in lines if line.endswith("\n")]
        new = [e for e in logged if "loss" in e][len(self.steps) :]
        for entry in new:
            lengths, sampled = read_lengths(run_dir / "rollouts" / f"step-{entry['step']:06d}.jsonl.zst")
            step = self.split(entry, lengths, sampled)
            self.steps.append(step)
            parts = ", ".join(f"{part} {step['seconds'][part]:.2f}" for part in PARTS)
            mfu = f", MFU {step['mfu']:.3f}" if step["mfu"] else ""
            rate = step["tokens_per_s"]
            print(
                f"step {entry['step']}: {step['seconds']['step']:.2f} s ({parts}), {rate:.0f} tokens/s{mfu}"
            )
        return bool(new)

    def split(self, entry: dict[str, Any], lengths: list[int], sampled: int) -> dict[str, Any]:
        """Returns the measurements of one step.

        entry: the step's line of metrics.jsonl. lengths: tokens of each rollout. sampled: how many tokens the
        policy sampled in all rollouts.
        """
        seconds = {part: entry[f"time/{part}"] for part in ("step", *PARTS)}
        flops = self.update_flops(lengths)
        peak = (self.args.peak_flops or 0.0) * self.args.train_gpus
        updating = seconds["update"] + seconds["other"]
        return {
            "step": entry["step"],
            "warm_up": len(self.steps) < self.warm_up,
            "seconds": seconds,
            "rollouts": len(lengths),
            "sampled_tokens": sampled,
            "trained_tokens": sum(lengths),
            "longest": max(lengths, default=0),
            "tokens_per_s": sampled / seconds["step"],
            "update_tokens_per_s": sum(lengths) / updating,
            "mfu": flops / updating / peak if peak else None,
            "mfu_update": flops / seconds["update"] / peak if peak else None,
            "failed": {name: entry.get(f"{name}/failed") for name in self.args.env},
            "drift": entry.get("drift"),
        } | {name: entry[name] for name in OF_OVERLAP if name in entry}

    def update_flops(self, lengths: list[int]) -> float:
        """Returns the FLOPs of the update on rollouts of these lengths, by the MFU formula of the module."""
        m = self.model
        num = m["parameters"]
        if not m.get("tie_word_embeddings"):
            num -= m["vocab_size"] * m["hidden_size"]
        head_dim = m.get("head_dim") or m["hidden_size"] // m["num_attention_heads"]
        width = m["num_attention_heads"] * head_dim
        squares = sum(length**2 for length in lengths)
        return 6.0 * num * sum(lengths) + 12.0 * m["num_hidden_layers"] * width * squares

    def summary(self) -> dict[str, Any]:
        """Returns medians over the measured steps, warm-up excluded; {} if there is none."""
        steps = [step for step in self.steps if not step["warm_up"]]
        if not steps:
            return {}

        def median(name: str) -> float | None:
            values = [step[name] for step in steps if step.get(name) is not None]
            return statistics.median(values) if values else None

        names = ("tokens_per_s", "update_tokens_per_s", "trained_tokens", "mfu", "mfu_update")
        parts = ("step", *PARTS)
        seconds = {part: statistics.median(step["seconds"][part] for step in steps) for part in parts}
        overlap = {name: median(name) for name in OF_OVERLAP if name in steps[0]}
        return {"steps": len(steps), "seconds": seconds} | {name: median(name) for name in names} | overlap

    def mean_step(self) -> float | None:
        steps = [step["seconds"]["step"] for step in self.steps if not step["warm_up"]]
        return statistics.fmean(steps) if steps else None

    def show(self) -> None:
        if medians := self.summary():
            steps, tokens = medians["steps"], medians["trained_tokens"]
            print(f"\n{self.way}: median of {steps} steps, {tokens:.0f} tokens trained in each")
            whole = medians["seconds"]["step"]
            for part in PARTS:
                seconds = medians["seconds"][part]
                print(f"  {part:<10}{seconds:>8.2f} s {seconds / whole:>6.1%}")
            print(f"  {'step':<10}{whole:>8.2f} s")
            print(f"rollouts: {medians['tokens_per_s']:.0f} tokens sampled for each second of a step")
            print(f"update: {medians['update_tokens_per_s']:.0f} tokens/s", end="")
            if medians["mfu"]:
                mfu, alone = medians["mfu"], medians["mfu_update"]
                print(f", MFU {mfu:.3f} ({alone:.3f} of time/update alone)", end="")
            print()
        if self.error:
            print(f"error: {self.error}", file=sys.stderr)


def read_lengths(path: Path) -> tuple[list[int], int]:
    """Returns the tokens (prompt and generation) of each rollout that did not fail, and the total sampled."""
    lengths, sampled = [], 0
    for record in read_outcomes(path):
        if turns := (record.get("rollout") or {}).get("turns"):
            lengths.append(len(turns[-1]["prompt_ids"]) + len(turns[-1]["completion_ids"]))
            sampled += sum(len(turn["completion_ids"]) for turn in turns)
    return lengths, sampled


if __name__ == "__main__":
    main()
