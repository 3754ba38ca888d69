"""One environment's evaluation in numbers, from the lines of the rollouts' index."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from gymexp.statistics.intervals import Interval, mean_over_tasks, reward_interval, success_interval
from gymexp.statistics.samples import best_at_k, pass_at_k, pass_hat_k

Value = TypeVar("Value")


@dataclass(frozen=True)
class EnvSummary:
    """The numbers of one environment in one evaluation.

    planned, scored, failed: numbers of rollouts; planned less the other two were not played. reward, success:
    over the scored rollouts; None with fewer than two tasks. mean_reward, mean_success: their means, also of
    one task; None without a scored rollout. lowest, highest: the rewards between which all are.
    reward_failures_as_zero, success_failures_as_zero: the same if each failed rollout counts as one of reward
    0.
    pass_at, pass_hat, best_at: by k = 1, 2, 4, …, over the tasks with at least k scored samples.
    always, sometimes, never: numbers of tasks by how many of their scored samples succeeded.
    between_tasks, between_samples: the standard deviations of a reward over tasks and, for the same task,
    over samples; None where they cannot be told from one another, as with one sample of each task.
    turns: the mean number. tokens_p50, tokens_p95: quantiles of the tokens that the policy sampled.
    truncated: a share. These are over the scored rollouts, and None without any.
    """

    planned: int
    scored: int
    failed: int
    mean_reward: float | None
    mean_success: float | None
    lowest: float | None
    highest: float | None
    reward: Interval | None
    reward_failures_as_zero: Interval | None
    success: Interval | None
    success_failures_as_zero: Interval | None
    pass_at: dict[int, Interval]
    pass_hat: dict[int, Interval]
    best_at: dict[int, Interval]
    always: int
    sometimes: int
    never: int
    between_tasks: float | None
    between_samples: float | None
    turns: float | None
    tokens_p50: float | None
    tokens_p95: float | None
    truncated: float | None


def summarize(rows: Iterable[Mapping[str, Any]], planned: int, success_reward: float) -> EnvSummary:
    """Returns the summary of one evaluation of one environment.

    rows: the evaluation's lines of the index (`rollout_files.read_index`). planned: the number of rollouts
    that the evaluation was to play. success_reward: the reward from which a rollout counts as a success.
    """
    rows = list(rows)
    scored = [row for row in rows if row.get("reward") is not None]
    rewards = _by_task(scored, lambda row: float(row["reward"]))
    successes = _by_task(scored, lambda row: row["reward"] >= success_reward)
    counts = {task: (len(values), sum(values)) for task, values in successes.items()}
    ks = [2**i for i in range(max(map(len, rewards.values()), default=0).bit_length())]
    between_tasks, between_samples = _deviations(rewards.values())
    return EnvSummary(
        planned=planned,
        scored=len(scored),
        failed=len(rows) - len(scored),
        mean_reward=_mean([float(np.mean(values)) for values in rewards.values()]),
        mean_success=_mean([float(np.mean(values)) for values in successes.values()]),
        lowest=min((min(values) for values in rewards.values()), default=None),
        highest=max((max(values) for values in rewards.values()), default=None),
        reward=reward_interval(rewards),
        reward_failures_as_zero=reward_interval(_by_task(rows, lambda row: float(row.get("reward") or 0.0))),
        success=success_interval(successes),
        success_failures_as_zero=success_interval(
            _by_task(rows, lambda row: row.get("reward") is not None and row["reward"] >= success_reward)
        ),
        pass_at=_for_each_k(ks, counts, lambda count, k: pass_at_k(*count, k)),
        pass_hat=_for_each_k(ks, counts, lambda count, k: pass_hat_k(*count, k)),
        best_at=_for_each_k(ks, rewards, best_at_k),
        always=sum(good == num for num, good in counts.values()),
        sometimes=sum(0 < good < num for num, good in counts.values()),
        never=sum(good == 0 for _, good in counts.values()),
        between_tasks=between_tasks,
        between_samples=between_samples,
        turns=_mean([row["turns"] for row in scored]),
        tokens_p50=_quantile([row["tokens"] for row in scored], 0.5),
        tokens_p95=_quantile([row["tokens"] for row in scored], 0.95),
        truncated=_mean([row["outcome"] == "truncated" for row in scored]),
    )


def _by_task(
    rows: Iterable[Mapping[str, Any]], value_of: Callable[[Mapping[str, Any]], Value]
) -> dict[str, list[Value]]:
    values: dict[str, list[Value]] = {}
    for row in rows:
        values.setdefault(row["key"], []).append(value_of(row))
    return values


def _for_each_k(
    ks: Sequence[int], by_task: Mapping[str, Value], estimate: Callable[[Value, int], float]
) -> dict[int, Interval]:
    """Returns the interval over tasks of an estimate for each k that two tasks have enough samples for."""
    found = {
        k: mean_over_tasks({task: estimate(samples, k) for task, samples in by_task.items()}) for k in ks
    }
    return {k: interval for k, interval in found.items() if interval}


def _deviations(rewards_by_task: Collection[Sequence[float]]) -> tuple[float | None, float | None]:
    """Returns the standard deviations of a reward over tasks and over samples of one task.

    The samples' variance is pooled over the tasks. The tasks' is that of their means, less the share that the
    samples have in it, and at least 0 (analysis of variance with random effects).
    """
    tasks = [np.asarray(rewards) for rewards in rewards_by_task]
    degrees = sum(len(rewards) - 1 for rewards in tasks)
    if len(tasks) < 2 or not degrees:
        return None, None
    within = sum(float(((rewards - rewards.mean()) ** 2).sum()) for rewards in tasks) / degrees
    of_means = float(np.var([rewards.mean() for rewards in tasks], ddof=1))
    between = of_means - within * float(np.mean([1 / len(rewards) for rewards in tasks]))
    return math.sqrt(max(0.0, between)), math.sqrt(within)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _quantile(values: Sequence[float], share: float) -> float | None:
    return float(np.quantile(values, share)) if values else None
