"""How long a step would take if its rollouts were played ahead of it, from a run's own times. Pure.

A token takes longer the more requests the engine samples at once: seconds a token are proportional to the
load to the power of an exponent. Near 0, decode latency holds the rollouts back, and more of them in flight
cost nothing. Near 1, throughput does, and more in flight take as much longer.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import median, pvariance
from typing import Any

Row = Mapping[str, Any]
_MIN_ROLLOUTS = 16
_MIN_SPREAD = 0.15  # standard deviation of log(speed) at exponent 1, below which the loads are too equal
_PARTS = 20  # The exponent is a multiple of 1 / _PARTS.


def load_exponent(rows: Sequence[Row]) -> float | None:
    """Returns the exponent, from 0 to 1, that explains the rollouts' seconds a token best: with it the least
    variance of their logarithms is left within the environments. None if too few rollouts, or too equal
    loads, tell it.

    rows: lines of the index of all rollouts that were in flight together. The load is the number of requests
    in flight. Only the longer half of each environment's rollouts counts, as a short reply spends much of
    its time on its prompt.
    """
    played = [row for row in rows if _policy_s(row) > 0 and _end(row) > row["began"] and row.get("tokens")]
    by_env: dict[str, list[int]] = defaultdict(list)
    for row in played:
        by_env[row["env"]].append(row["tokens"])
    half = {env: median(tokens) for env, tokens in by_env.items()}
    longer = [row for row in played if row["tokens"] >= half[row["env"]]]
    envs = [row["env"] for row in longer]
    seconds = [math.log(_policy_s(row) / row["tokens"]) for row in longer]
    load = _Load(played)
    at_throughput = [math.log(load.mean_speed(row, 1.0)) for row in longer]
    if len(longer) < _MIN_ROLLOUTS or math.sqrt(_variance_within(envs, at_throughput)) < _MIN_SPREAD:
        return None

    def unexplained(exponent: float) -> float:
        speeds = [math.log(load.mean_speed(row, exponent)) for row in longer]
        return _variance_within(envs, [a + b for a, b in zip(seconds, speeds, strict=True)])

    return min((n / _PARTS for n in range(_PARTS + 1)), key=unexplained)


def step_with_lead(batch_s: float, trainer_s: float, lead: int, exponent: float) -> float:
    """Returns the seconds of a step whose rollouts are played `lead` batches ahead.

    batch_s: of a batch of rollouts that is alone in flight. trainer_s: of all else in a step.

    A batch that starts with the weights of one step has until it is taken `lead` steps later, so
    (lead + 1) * step - trainer_s seconds; it shares the engine with the batches of these steps. The step is
    the shortest one in which it ends in time, and no shorter than the trainer's part.
    """
    low, high = trainer_s, batch_s + trainer_s
    for _ in range(50):
        step = (low + high) / 2
        in_flight = lead + 1 - trainer_s / step
        is_in_time = batch_s * in_flight ** (exponent - 1) <= step
        low, high = (low, step) if is_in_time else (step, high)
    return high


def _policy_s(row: Row) -> float:
    return (row.get("seconds") or {}).get("policy") or 0.0


def _end(row: Row) -> float:
    return row["began"] + (row["seconds"].get("total") or 0.0)


def _variance_within(groups: Sequence[str], values: Sequence[float]) -> float:
    """Returns the variance of the values around the mean of their group."""
    by_group: dict[str, list[float]] = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        by_group[group].append(value)
    return sum(len(of) * pvariance(of) for of in by_group.values()) / len(values) if values else 0.0


class _Load:
    """The number of requests in flight over time. A rollout counts as the share of its time that its requests
    take."""

    def __init__(self, rows: Sequence[Row]) -> None:
        changes: list[tuple[float, float]] = []
        for row in rows:
            share = min(1.0, _policy_s(row) / row["seconds"]["total"])
            changes += [(row["began"], share), (_end(row), -share)]
        changes.sort()
        self._times = [time for time, _ in changes]
        self._levels = [max(1.0, level) for level in accumulate(change for _, change in changes)]
        self._areas: dict[float, list[float]] = {}

    def mean_speed(self, row: Row, exponent: float) -> float:
        """Returns the mean of load ** -exponent while a rollout was played."""
        if exponent not in self._areas:
            spans = zip(self._times, self._times[1:], self._levels, strict=False)
            parts = ((end - begin) * level**-exponent for begin, end, level in spans)
            self._areas[exponent] = [0.0, *accumulate(parts)]
        areas = self._areas[exponent]
        begin, end = (bisect_left(self._times, time) for time in (row["began"], _end(row)))
        return (areas[end] - areas[begin]) / (self._times[end] - self._times[begin])
