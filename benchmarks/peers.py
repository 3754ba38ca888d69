"""Compares a training step of gymexp with one of TRL's own GRPOTrainer and `trl vllm-serve`, in one run.

    python benchmarks/make_model.py outputs/model_1_5b --size 1.5b
    python benchmarks/peers.py --model outputs/model_1_5b --env sudoku              two GPUs

gymexp trains first, in the ways of step.py (`--ways`, here `in_turn ahead`; all options of step.py hold).
TRL's trainer then gets the same model, prompts, numbers of rollouts, lengths of replies and micro-batches,
with vLLM on the first GPU and the trainer on the second. The ratio is that of the mean seconds of the
measured steps. Both must train the same number of tokens in a step, or the script ends with an error; so
`--env` must be one environment without tools.

The deadline (--deadline-s) is for each side. On a CPU, `--engine hf` tries the script: TRL then samples with
transformers in the trainer, which says nothing about speed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import facts
import step

from gymexp.cluster.placement import visible_gpus
from gymexp.processes import ports

SERVE = "from trl.cli import main; main()"


def main() -> None:
    args = step.parse(__doc__ or "", ["in_turn", "ahead"], facts.RESULTS / "peers.json")
    if len(args.env) != 1:
        sys.exit(f"error: --env must be one environment without tools, got {' '.join(args.env)}")
    with ExitStack() as stack:
        if args.run_dir is None:
            args.run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        results = step.measure(args)
        args.until = time.monotonic() + args.deadline_s
        steps, error = measure_trl(args, args.run_dir.with_name(f"{args.run_dir.name}_{args.ways[0]}"))
    measured = steps[args.warm_up :]
    summary: dict[str, Any] = {"steps": steps, "error": error or None}
    if measured:
        ours = results.reports[0].steps[0]["trained_tokens"]
        theirs = steps[0]["num_tokens"]
        if abs(theirs - ours) > 0.01 * ours:
            error = f"TRL trained {theirs:.0f} tokens in a step, and gymexp {ours}"
            summary["error"] = error
        summary["step_s"] = statistics.fmean(one["seconds"] for one in measured)
        summary["ratios"] = {
            report.way: mean / summary["step_s"] for report in results.reports if (mean := report.mean_step())
        }
    facts.write(args.output, json.loads(args.output.read_text()) | {"trl": summary})
    for way, ratio in summary.get("ratios", {}).items():
        print(f"a step of gymexp ({way}) takes {ratio:.3f} of one of TRL ({summary['step_s']:.2f} s)")
    if error:
        print(f"error: {error}", file=sys.stderr)
    sys.exit(1 if error or any(report.error for report in results.reports) else 0)


def measure_trl(args: Any, run_dir: Path) -> tuple[list[dict[str, Any]], str]:
    """Returns the steps of TRL's trainer on the prompts of gymexp's run, and an error message or ""."""
    directory = run_dir.with_name("trl")
    directory.mkdir(parents=True, exist_ok=True)
    prompts = directory / "prompts.jsonl"
    rows = [json.loads(line)["row"] for line in (run_dir / "data" / "train.jsonl").read_text().splitlines()]
    messages = [row["responses_create_params"]["input"] for row in rows]
    prompts.write_text("".join(f"{json.dumps(one)}\n" for one in messages))
    settings = {
        "model": str(args.model.resolve()),
        "prompts": str(prompts),
        "directory": str(directory),
        "steps": args.warm_up + args.steps,
        "group": args.group,
        "micro_batch": args.micro_batch,
        "accumulation": args.rollouts // args.micro_batch,
        "tokens": args.tokens,
    }
    gpus = visible_gpus()
    with ExitStack() as stack:
        server = stack.enter_context(served(args, directory, gpus[0])) if gpus else None
        environment = environment_on(gpus[1] if gpus else None)
        command = [args.engine_python or sys.executable, str(Path(__file__).with_name("trl_peer.py"))]
        log = directory / "trainer.txt"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, json.dumps(settings | {"server": server})], stdout=out, stderr=out, env=environment
            )
        error = waited(process, args, log)
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"step"')], error


def waited(process: subprocess.Popen[bytes], args: Any, log: Path) -> str:
    """Waits for the end of the trainer; returns an error message, or "" if all went well."""
    try:
        code = process.wait(max(1.0, args.until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"TRL did not end within {args.deadline_s:.0f} s (--deadline-s):\n{log.read_text()[-2000:]}"
    return f"TRL's trainer ended with {code}:\n{log.read_text()[-3000:]}" if code else ""


def environment_on(gpu: str | None) -> dict[str, str]:
    return os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})


@contextmanager
def served(args: Any, directory: Path, gpu: str) -> Iterator[str]:
    """Runs `trl vllm-serve` on a GPU within the block; gives its address once it is healthy."""
    with ports.listen() as free:
        port = free.getsockname()[1]
    command = [args.engine_python or sys.executable, "-c", SERVE, "vllm-serve", "--host", "127.0.0.1"]
    command += ["--model", str(args.model.resolve()), "--port", str(port)]
    command += ["--max-model-len", str(args.max_model_len), "--dtype", "bfloat16"]
    log = directory / "server.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment_on(gpu))
    address = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{address}/health"):
            if process.poll() is not None or time.monotonic() > args.until:
                sys.exit(f"error: trl vllm-serve is not healthy:\n{log.read_text()[-3000:]}")
            time.sleep(1.0)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


if __name__ == "__main__":
    main()
