"""Run directories as runs write them, without the runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

ENVS = {"sudoku": (0.7, 0.2), "workplace": (0.5, 0.1)}  # reward before training, and what training adds


def write_run(
    path: Path,
    overrides: list[str],
    *,
    steps: int = 4,
    max_steps: int = 4,
    outcome: str | None = "finished",
    gain: float = 1.0,
    result: dict[str, Any] | None = None,
    **status: Any,
) -> Path:
    """A run that is `steps` far; with outcome "finished" it has its result. `gain` scales what it learns."""
    (path / "logs").mkdir(parents=True)
    (path / "config.yaml").write_text("name: tiny\n")
    (path / "overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides))
    (path / "logs" / "trainer.log").write_text("loading\n")
    began = time.time() - 100
    lines = []
    for step in range(steps + 1):
        rewards = {env: start + gain * more * step / max_steps for env, (start, more) in ENVS.items()}
        at = began + 10 * (step + 1)
        if step:
            train = {f"{env}/{k}": v for env, r in rewards.items() for k, v in _numbers(r - 0.05).items()}
            lines.append({"step": step, "time": at, "loss": 0.1, "reward": 0.5, "time/step": 8.0} | train)
        held_out = {f"eval_{env}/{k}": v for env, r in rewards.items() for k, v in _numbers(r).items()}
        lines.append({"step": step, "time": at + 1} | held_out)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "timeline.jsonl").write_text(json.dumps({"time": began, "event": "start"}) + "\n")
    if outcome == "finished":
        table = {env: {"reward": [start, start + gain * more]} for env, (start, more) in ENVS.items()}
        result = {"step": steps, "stopped": False, "held_out": table} | (result or {})
    if result:
        (path / "result.json").write_text(json.dumps(result))
    said = {
        "pid": os.getpid(),
        "began": began + 1000,
        "ended": outcome and (outcome if outcome in ("finished", "requeued") else "failed"),
        "outcome": outcome,
        "services": {"trainer": "ready"},
    }
    said |= {"phase": "train", "step": steps, "max_steps": max_steps} | status
    (path / "status.json").write_text(json.dumps(said))
    return path


def _numbers(reward: float) -> dict[str, float]:
    return {"reward": reward, "rollouts": 8, "tokens": 20.0, "turns": 1.0, "failed": 0.0}
