"""What k samples of one task would give, estimated without bias from its n samples: the mean over all choices
of k of the n. NaN with fewer than k samples. Integers keep the results exact for any n."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pass_at_k(num_samples: int, num_successes: int, k: int) -> float:
    """Returns the probability that at least one of k samples of a task succeeds.

    Source: Chen et al., "Evaluating large language models trained on code" (arXiv:2107.03374), section 2.1.
    """
    choices = _num_choices(num_samples, k)
    if not choices:
        return math.nan
    return (choices - math.comb(num_samples - num_successes, k)) / choices


def pass_hat_k(num_samples: int, num_successes: int, k: int) -> float:
    """Returns the probability that all of k samples of a task succeed (pass^k).

    Source: Yao et al., "tau-bench" (arXiv:2406.12045), section 4.
    """
    choices = _num_choices(num_samples, k)
    return math.comb(num_successes, k) / choices if choices else math.nan


def best_at_k(rewards: Sequence[float], k: int) -> float:
    """Returns the expected best reward of k samples of a task, drawn without replacement. For rewards of 0
    and 1 it is pass@k. The i-th smallest reward is the best in C(i - 1, k - 1) of the C(n, k) choices."""
    choices = _num_choices(len(rewards), k)
    if not choices:
        return math.nan
    ranked = enumerate(sorted(rewards))
    return math.fsum(reward * (math.comb(below, k - 1) / choices) for below, reward in ranked)


def _num_choices(num_samples: int, k: int) -> int:
    assert k >= 1, k
    return math.comb(num_samples, k)
