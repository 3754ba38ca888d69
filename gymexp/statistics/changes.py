"""Whether the change of a reward from one evaluation to another is more than noise, paired by task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gymexp.statistics.intervals import CONFIDENCE, t_quantile

_POWER = 0.8
_MOST_EXACT = 16  # tasks that differ, up to which every choice of signs is tried
_NUM_DRAWS = 10_000
_BLOCK = 100  # draws at a time: 20,000 tasks take 16 MB


@dataclass(frozen=True)
class Change:
    """The mean change of a reward from one evaluation to another, over the tasks that both have scored.

    low, high: the 95 % interval. p: how often chance alone gives a mean as far from 0 (two-sided). better,
    same, worse: numbers of tasks. error: the standard error of the mean change. detectable: the smallest true
    change that as noisy an experiment finds (p < 0.05) four times of five. unpaired_error: the standard error
    without the pairing; it is larger if the tasks' rewards correlate. correlation: of the rewards before and
    after over tasks; None if all tasks have the same reward in one of the evaluations.
    """

    num_tasks: int
    mean: float
    low: float
    high: float
    p: float
    better: int
    same: int
    worse: int
    error: float
    detectable: float
    unpaired_error: float
    correlation: float | None


def paired_change(before: Mapping[str, float], after: Mapping[str, float]) -> Change | None:
    """Returns the change from `before` to `after`, rewards by task; None with fewer than two common tasks.

    The interval is Student's t over the differences by task, and p that of a sign-flip test: without a change
    each difference is as likely with the other sign.

    Source: Miller, "Adding error bars to evals" (arXiv:2411.00640), section 4.2; Good, "Permutation,
    Parametric and Bootstrap Tests of Hypotheses" (2005), section 3.2; Bloom, "Minimum detectable effects"
    (1995), for the sum of the quantiles of Student's t.
    """
    keys = sorted(before.keys() & after.keys())
    if len(keys) < 2:
        return None
    before_N, after_N = np.array([[rewards[key] for key in keys] for rewards in (before, after)], float)
    differences_N = after_N - before_N
    mean = float(differences_N.mean())
    error = float(differences_N.std(ddof=1)) / math.sqrt(len(keys))
    quantile = t_quantile((1 + CONFIDENCE) / 2, len(keys) - 1)
    return Change(
        num_tasks=len(keys),
        mean=mean,
        low=mean - quantile * error,
        high=mean + quantile * error,
        p=sign_flip_p(differences_N),
        better=int((differences_N > 0).sum()),
        same=int((differences_N == 0).sum()),
        worse=int((differences_N < 0).sum()),
        error=error,
        detectable=(quantile + t_quantile(_POWER, len(keys) - 1)) * error,
        unpaired_error=math.sqrt((before_N.var(ddof=1) + after_N.var(ddof=1)) / len(keys)),
        correlation=_correlation(before_N, after_N),
    )


def _correlation(before_N: np.ndarray, after_N: np.ndarray) -> float | None:
    if np.ptp(before_N) == 0 or np.ptp(after_N) == 0:
        return None
    return float(np.corrcoef(before_N, after_N)[0, 1])


def sign_flip_p(differences_N: np.ndarray) -> float:
    """Returns the share of choices of the differences' signs whose sum is at least as far from 0 as theirs.

    All choices are tried for up to 16 differences other than 0. For more, 10,000 are drawn, always the same,
    and the differences' own signs count as one of them, so that p is never 0.
    """
    changed_M = differences_N[differences_N != 0]
    # Sums in another order differ in their last digits.
    observed = abs(changed_M.sum()) - 1e-9 * abs(changed_M).sum()
    if len(changed_M) <= _MOST_EXACT:
        choices_CM = (np.arange(2 ** len(changed_M))[:, None] >> np.arange(len(changed_M))) & 1
        return float((abs((2 * choices_CM - 1) @ changed_M) >= observed).mean())
    random = np.random.default_rng(0)
    as_far = 0
    for _ in range(_NUM_DRAWS // _BLOCK):
        choices_CM = random.integers(0, 2, (_BLOCK, len(changed_M)), dtype=np.int8)
        as_far += int((abs((2 * choices_CM - 1) @ changed_M) >= observed).sum())
    return (as_far + 1) / (_NUM_DRAWS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values adjusted for their number, in the same order, by Holm's step-down method.

    Source: Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
