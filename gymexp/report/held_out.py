"""Held-out rewards before and after training, with their intervals, from the index of rollouts."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gymexp.rollout.rollout_files import read_index
from gymexp.statistics import Change, Interval, holm, paired_change, reward_interval

MIN_TASKS = 6  # with fewer, an interval may have no width, and no p is below 0.05
_BEFORE = "eval-000000"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class HeldOut:
    """The held-out rewards of one environment in its first and in its newest evaluation.

    reward_before, reward_after: means over the tasks; reward_before is None with a single evaluation. before,
    after: their intervals. change: paired by task; p: of the change, adjusted for the number of environments.
    Intervals, change and p are None where fewer than six tasks were scored. num_scored, num_failed: numbers
    of rollouts in the newest evaluation, which add up to the planned ones.
    """

    reward_before: float | None
    reward_after: float | None
    before: Interval | None = None
    after: Interval | None = None
    change: Change | None = None
    p: float | None = None
    num_scored: int = 0
    num_failed: int = 0


def read_held_out(rollouts: Path) -> dict[str, HeldOut]:
    """Returns the held-out rewards of each environment before training and in the newest evaluation. Empty
    for a run without an index, and for one that has no evaluation after a training step."""
    by_file: dict[str, list[Row]] = defaultdict(list)
    for row in read_index(rollouts):
        if row["file"].startswith("eval-"):
            by_file[row["file"]].append(row)
    newest = max(by_file, default=_BEFORE)
    return {} if newest == _BEFORE else compared(by_file.get(_BEFORE, []), by_file[newest])


def compared(first: Sequence[Row], last: Sequence[Row]) -> dict[str, HeldOut]:
    """Returns the held-out rewards of each environment. first, last: lines of the index of two evaluations;
    first is empty if there is one alone."""
    found = {env: _of_env(first, last, env) for env in dict.fromkeys(row["env"] for row in last)}
    changes = {env: one.change for env, one in found.items() if one.change}
    for env, p in zip(changes, holm([change.p for change in changes.values()]), strict=True):
        found[env] = dataclasses.replace(found[env], p=p)
    return found


def rewards_by_task(rows: Iterable[Row], env: str) -> dict[str, list[float]]:
    """Returns the rewards of each task of an environment, without failed rollouts."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["env"] == env and row.get("reward") is not None:
            rewards[row["key"]].append(row["reward"])
    return rewards


def mean_by_task(rows: Iterable[Row], env: str) -> dict[str, float]:
    """Returns the mean reward of each task of an environment, without failed rollouts."""
    return {key: sum(values) / len(values) for key, values in rewards_by_task(rows, env).items()}


def number(value: float | None, sign: str = "") -> str:
    """Returns a number with three decimals; a dash for None."""
    return "–" if value is None else f"{value:{sign}.3f}"


def p_text(p: float | None) -> str:
    """Returns a p-value as text; a dash for None."""
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _of_env(first: Sequence[Row], last: Sequence[Row], env: str) -> HeldOut:
    means = [mean_by_task(rows, env) for rows in (first, last)]
    rewards = [sum(of_one.values()) / len(of_one) if of_one else None for of_one in means]
    intervals = [
        reward_interval(rewards_by_task(rows, env)) if len(of_one) >= MIN_TASKS else None
        for rows, of_one in zip((first, last), means, strict=True)
    ]
    change = paired_change(*means)
    of_env = [row for row in last if row["env"] == env]
    num_scored = sum(row.get("reward") is not None for row in of_env)
    return HeldOut(
        rewards[0],
        rewards[1],
        intervals[0],
        intervals[1],
        change=change if change and change.num_tasks >= MIN_TASKS else None,
        num_scored=num_scored,
        num_failed=len(of_env) - num_scored,
    )
