"""95 % intervals of a mean over tasks. Each task counts once, however many samples of it were scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class Interval:
    """A mean over tasks, its 95 % interval from low to high, and the number of tasks."""

    mean: float
    low: float
    high: float
    num_tasks: int


def t_quantile(probability: float, degrees: int) -> float:
    """Returns the quantile of Student's t with so many degrees of freedom."""
    from scipy.special import stdtrit  # a tenth of a second, which a command without intervals does not spend

    return float(stdtrit(degrees, probability))


def reward_interval(rewards_by_task: Mapping[str, Sequence[float]]) -> Interval | None:
    """Returns the mean of the tasks' mean rewards, with Student's t over these means. None with fewer than
    two tasks that have a sample. A reward that is NaN makes the interval NaN.

    Student's t takes the mean for normally distributed, and knows no bounds of the rewards: with few tasks
    the interval may reach beyond rewards that are possible. It is not cut off there, as NeMo Gym does not say
    which rewards are possible, and as the part beyond shows how little so few tasks tell. If all tasks have
    the same mean the interval has no width, which says that their spread is unknown, not that it is 0.

    With as many samples of each task, the standard error is the one of Miller, "Adding error bars to evals"
    (arXiv:2411.00640), appendix A, with samples clustered by task. Miller multiplies it by 1.96, the normal
    distribution's quantile; that of Student's t is larger with few tasks (NIST/SEMATECH e-Handbook of
    Statistical Methods, section 1.3.5.2).
    """
    means = {task: float(np.mean(rewards)) for task, rewards in rewards_by_task.items() if len(rewards)}
    return _t_interval(list(means.values()))


def mean_over_tasks(values_by_task: Mapping[str, float]) -> Interval | None:
    """Returns the mean of a value that each task has once, such as pass@k, with Student's t over the tasks.
    Tasks whose value is NaN are left out. None with fewer than two others."""
    return _t_interval([value for value in values_by_task.values() if not math.isnan(value)])


def success_interval(successes_by_task: Mapping[str, Sequence[bool]]) -> Interval | None:
    """Returns the mean of the tasks' shares of successes, with Wilson's interval on the effective sample
    size. None with fewer than two tasks that have a sample.

    Samples of one task resemble each other, so that n samples tell less than n independent ones would. The
    effective size is n over the design effect (the variance of the mean over tasks, relative to that of n
    independent samples), times the squared ratio of the quantiles of Student's t for samples and tasks. It is
    at most n. If all samples agree, their resemblance cannot be estimated, and each task counts as one.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927); Korn and
    Graubard, "Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data" (1998), for the effective size; Franco et al., "Comparative study of confidence
    intervals for proportions in complex sample surveys" (2019), for Wilson's interval with it.
    """
    samples = [np.asarray(values, float) for values in successes_by_task.values() if len(values)]
    if len(samples) < 2:
        return None
    shares_N = np.array([values.mean() for values in samples])
    share = float(shares_N.mean())
    size = _effective_size(shares_N, sum(map(len, samples)))
    centre = (share + _Z**2 / (2 * size)) / (1 + _Z**2 / size)
    half = _Z / (1 + _Z**2 / size) * math.sqrt(share * (1 - share) / size + _Z**2 / (4 * size**2))
    # Rounding may put an end beyond the share itself, where all samples agree.
    return Interval(
        share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), len(samples)
    )


def _effective_size(shares_N: np.ndarray, num_samples: int) -> float:
    """Returns the number of independent samples that tell as much as `num_samples` samples of the tasks."""
    num_tasks, share = len(shares_N), float(shares_N.mean())
    if share in (0.0, 1.0):
        return num_tasks
    variance = float(shares_N.var(ddof=1)) / num_tasks
    if variance == 0:
        return num_samples
    independent = share * (1 - share) / (num_samples - 1)
    tail = (1 + CONFIDENCE) / 2
    quantiles = t_quantile(tail, num_samples - 1) / t_quantile(tail, num_tasks - 1)
    return min(num_samples, num_samples * independent / variance * quantiles**2)


def _t_interval(values: Sequence[float]) -> Interval | None:
    if len(values) < 2:
        return None
    values_N = np.array(values)
    mean = float(values_N.mean())
    error = float(values_N.std(ddof=1)) / math.sqrt(len(values))
    half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * error
    return Interval(mean, mean - half, mean + half, len(values))
