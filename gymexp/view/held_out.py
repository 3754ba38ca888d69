"""A run's held-out rewards with their intervals, from the index of its rollouts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gymexp.rollout.rollout_files import read_index
from gymexp.statistics import Change, Interval, paired_change, reward_interval

_BEFORE = "eval-000000"
_MIN_TASKS = 6  # with fewer, an interval may have no width, and no p is below 0.05


@dataclass(frozen=True)
class HeldOut:
    """The held-out rewards of one environment, before training and in the newest evaluation.

    An interval and the change are None where fewer than six tasks were scored. num_scored, num_failed:
    numbers of rollouts in the newest evaluation, which add up to the planned ones.
    """

    before: Interval | None
    after: Interval | None
    change: Change | None
    num_scored: int
    num_failed: int


def read_held_out(rollouts: Path) -> dict[str, HeldOut]:
    """Returns the held-out rewards of each environment. Empty for a run without an index, and for one that
    has no evaluation after a training step."""
    by_file: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_index(rollouts):
        if row["file"].startswith("eval-"):
            by_file[row["file"]].append(row)
    newest = max(by_file, default=_BEFORE)
    if newest == _BEFORE:
        return {}
    envs = dict.fromkeys(row["env"] for row in by_file[newest])
    return {env: _held_out(by_file.get(_BEFORE, []), by_file[newest], env) for env in envs}


def _held_out(before: list[dict[str, Any]], after: list[dict[str, Any]], env: str) -> HeldOut:
    rewards = [_rewards_by_task(rows, env) for rows in (before, after)]
    means = [{task: sum(values) / len(values) for task, values in of_one.items()} for of_one in rewards]
    intervals = [reward_interval(of_one) if len(of_one) >= _MIN_TASKS else None for of_one in rewards]
    change = paired_change(*means)
    num = sum(row["env"] == env for row in after)
    num_scored = sum(map(len, rewards[1].values()))
    found = change if change and change.num_tasks >= _MIN_TASKS else None
    return HeldOut(intervals[0], intervals[1], found, num_scored, num - num_scored)


def _rewards_by_task(rows: list[dict[str, Any]], env: str) -> dict[str, list[float]]:
    rewards: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["env"] == env and row.get("reward") is not None:
            rewards[row["key"]].append(row["reward"])
    return rewards
