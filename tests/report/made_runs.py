"""Directories of runs with every record that a run writes, without the runs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ENVS = ("sudoku", "workplace")
BEGAN = 1_795_000_000.0
STEP_S = 10.0
GROUP = 8


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def make_run(
    path: Path, steps: int = 30, rollouts: int = 32, envs: tuple[str, ...] = ENVS, **more: Any
) -> Path:
    """A finished run of so many steps, with so many rollouts a step over all environments."""
    rng = random.Random(0)
    path.mkdir(parents=True)
    config = {"name": "tiny", "seed": 1, "model": {"name": "tiny", "dtype": "float32"}}
    config |= {"trainer": {"learning_rate": 0.0002}, "env": {env: {"replicas": 2} for env in envs}}
    (path / "config.yaml").write_text(json.dumps(config | more))
    (path / "overrides.yaml").write_text("- seed=1\n- output_dir=/x\n")
    (path / "versions.txt").write_text("gymexp 0.1.0\npython 3.11\n")
    write_lines(
        path / "metrics.jsonl", (line for s in range(steps + 1) for line in _metrics(s, steps, envs, rng))
    )
    write_lines(path / "rollouts" / "index.jsonl", _rows(steps, rollouts, envs, rng))
    trained = (
        {"file": f"step-{s:06d}", "number": n, "offset": 0, "length": 9, "line": 0}
        | {"advantage": rng.gauss(0, 1), "trained": 20, "ratio_max": 1.01}
        for s in range(1, steps + 1)
        for n in range(rollouts)
    )
    write_lines(path / "rollouts" / "train_index.jsonl", trained)
    write_lines(path / "timeline.jsonl", _timeline(steps))
    write_lines(path / "system.jsonl", _system(steps))
    result = {"step": steps, "stopped": False, "held_out": {}}
    (path / "result.json").write_text(json.dumps(result))
    status = {"ended": "finished", "outcome": "finished", "step": steps, "max_steps": steps, "pid": 1}
    (path / "status.json").write_text(json.dumps(status))
    return path


def _metrics(step: int, steps: int, envs: tuple[str, ...], rng: random.Random) -> Iterable[dict[str, Any]]:
    reward = 0.4 + 0.4 * step / steps
    at = BEGAN + STEP_S * (step + 1)
    if step:
        line: dict[str, Any] = {
            "step": step,
            "time": at,
            "loss": 1e-8,
            "grad_norm": 0.5,
            "learning_rate": 2e-4,
        }
        line |= {
            "time/step": STEP_S,
            "time/rollout": 6.0,
            "time/update": 3.0,
            "time/other": 1.0,
            "time/sync": 0.0,
        }
        line |= {
            "entropy": 0.5,
            "reward": reward,
            "groups_without_variance": 0.25,
            "clip_ratio/region_mean": 0.01,
        }
        line |= {
            "sampling/ratio_max": 1.1,
            "drift": 1e-6,
            "completions/clipped_ratio": 0.0,
        }
        for env in envs:
            values = {
                "rollouts": 16,
                "reward": reward + rng.uniform(-0.05, 0.05),
                "success": reward,
                "turns": 2.0,
            }
            values |= {"tokens": 30 + 10 * math.sin(step / 5), "nll": 0.4, "tool_calls": 1.0, "failed": 0.0}
            values |= {"truncated": 0.02, "truncated_length": 0.02, "truncated_turns": 0.0, "retried": 0.1}
            values |= {"groups_mixed": 0.75, "groups_all_solved": 0.25, "drift": 1e-6, "token_mismatches": 0}
            line |= {f"{env}/{name}": value for name, value in values.items()}
        yield line
    if step % max(1, steps // 3) == 0:
        held = {"rollouts": 20, "reward": reward, "success": reward, "failed": 0.0}
        yield {"step": step, "time": at + 1} | {f"eval_{env}/{k}": v for env in envs for k, v in held.items()}


def _rows(steps: int, rollouts: int, envs: tuple[str, ...], rng: random.Random) -> Iterable[dict[str, Any]]:
    for step in range(steps + 1):
        if step:
            for n in range(rollouts):
                env = envs[(n // GROUP) % len(envs)]
                key = f"{env}/train/{(step * rollouts + n) // GROUP % 500:06d}"
                yield _row(f"step-{step:06d}", n, env, key, BEGAN + STEP_S * step + 0.01 * n, rng)
        if step % max(1, steps // 3) == 0:
            for n in range(20 * len(envs)):
                env = envs[n // 20]
                key = f"{env}/validation/{n % 20:06d}"
                yield _row(f"eval-{step:06d}", n, env, key, BEGAN, rng, 0.4 + 0.4 * step / steps)


def _row(
    file: str, number: int, env: str, key: str, began: float, rng: random.Random, reward: float = 0.5
) -> dict[str, Any]:
    row: dict[str, Any] = {"file": file, "offset": 0, "length": 900, "line": number % GROUP, "number": number}
    row |= {
        "group": number // GROUP,
        "index": 0,
        "key": key,
        "env": env,
        "outcome": "completed",
        "failures": [],
    }
    solved = rng.random() < reward
    row |= {"reward": float(solved), "success": solved, "refused": False, "turns": 2, "prompt_tokens": 100}
    row |= {"tokens": rng.randint(10, 60), "nll": 0.4, "tool_calls": 2, "tool_errors": 1, "began": began}
    total = rng.uniform(1, 5)
    row |= {
        "seconds": {"total": total, "policy": 0.3 * total, "queue": 0.1},
        "seed": 7,
        "replica": f"{env}-0",
    }
    return row | {"weights_version": 0, "text": f"answer {rng.randint(0, 5)}"}


def _timeline(steps: int) -> Iterable[dict[str, Any]]:
    yield {"time": BEGAN, "seconds": 1.0, "event": "start"}
    for step in range(1, steps + 1):
        at = BEGAN + STEP_S * step
        for name, offset, seconds in (("sync", 0.0, 0.1), ("rollout", 0.1, 6.0), ("logprobs", 6.1, 0.5)):
            yield {"time": at + offset, "seconds": seconds, "span": name, "step": step}
        yield {"time": at + 6.6, "seconds": 3.0, "span": "update", "step": step}
    yield {"time": BEGAN + STEP_S * steps, "seconds": 0.4, "span": "checkpoint", "step": steps}
    yield {"time": BEGAN + STEP_S * (steps + 1), "seconds": 300.0, "event": "end"}


def _system(steps: int) -> Iterable[dict[str, Any]]:
    for number in range(2 * steps):
        gpus = [{"index": i, "utilization": 0.5, "memory_mb": 9_000, "power_w": 300.0} for i in range(2)]
        processes = {"trainer": {"rss_mb": 900.0, "cpu": 1.2}, "gateway": {"rss_mb": 90.0, "cpu": 0.1}}
        line = {
            "time": BEGAN + 5 * number,
            "cpu": 0.5,
            "memory_mb": 4_000,
            "processes": processes,
            "gpus": gpus,
        }
        yield line
