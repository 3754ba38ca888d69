"""What was seen of each environment of NeMo Gym that was tried (by `benchmarks/try_environments.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson


def tried_file(version: str) -> Path:
    """Returns the file for a version of NeMo Gym, which need not exist."""
    return Path(__file__).with_name(f"tried_{version}.json")


def load_tried(version: str) -> dict[str, dict[str, Any]]:
    """Returns what was seen, by the environment's name: {"rollouts", "scored" (with a reward), "turns" (the
    most of a rollout), "tokens", "rewards": [lowest, highest], "failed": why others failed, if any did}, or
    {"reason": why no rollout had a reward}. Empty for a version of which none was tried."""
    file = tried_file(version)
    return orjson.loads(file.read_bytes()) if file.exists() else {}


def describe(seen: Mapping[str, Any] | None) -> str:
    """Returns what was seen of one environment as a text."""
    if seen is None:
        return "no"
    if "reason" in seen:
        return f"no rollout had a reward: {seen['reason']}"
    low, high = seen["rewards"]
    failed = f"; others: {seen['failed']}" if "failed" in seen else ""
    return (
        f"{seen['scored']} of {seen['rollouts']} rollouts of the tiny policy had a reward, {low:g} to "
        f"{high:g}, with {seen['turns']} turns at most and {seen['tokens']} tokens{failed}"
    )
