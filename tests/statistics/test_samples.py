"""pass@k, pass^k and best@k are means over all choices of k samples, and agree with what others published."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gymexp.statistics import best_at_k, pass_at_k, pass_hat_k

rewards = st.floats(-10, 10).map(lambda value: round(value, 3))


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_a_pass_is_the_share_of_choices_with_a_success_and_pass_hat_of_those_without_a_failure(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    choices = list(combinations(samples, k))
    found = [f(len(samples), sum(samples), k) for f in (pass_at_k, pass_hat_k)]
    assert found == pytest.approx([np.mean([any(c) for c in choices]), np.mean([all(c) for c in choices])])


@given(st.lists(rewards, min_size=1, max_size=8), st.data())
def test_the_best_is_the_mean_over_choices_of_their_largest_reward_in_any_order(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    expected = np.mean([max(choice) for choice in combinations(samples, k)])
    assert best_at_k(samples, k) == pytest.approx(expected, abs=1e-9)
    assert best_at_k(samples[::-1], k) == best_at_k(samples, k)


@given(st.integers(1, 200), st.data())
def test_pass_at_k_is_that_of_human_evals_own_code(num, data):
    """`estimate_pass_at_k` of github.com/openai/human-eval: 1 - prod(1 - k / (n - c + 1 … n))."""
    good, k = data.draw(st.integers(0, num)), data.draw(st.integers(1, num))
    theirs = 1.0 if num - good < k else 1.0 - np.prod(1.0 - k / np.arange(num - good + 1, num + 1))
    assert pass_at_k(num, good, k) == pytest.approx(theirs, abs=1e-9)


def test_human_evals_own_example():
    """The README of github.com/openai/human-eval: three of six samples succeed, and pass@1 is this."""
    assert pass_at_k(6, 3, 1) == pytest.approx(0.4999999999999999)


def test_the_figures_of_inspects_reducers():
    """`pass_at(k)` and `pass_k(k)` of inspect-ai 0.3.285, on eight samples of which four succeed."""
    theirs = {1: (0.5, 0.5), 2: (0.7857142857142857, 0.21428571428571427), 3: (0.9285714285714286, 1 / 14)}
    for k, figures in (theirs | {5: (1.0, 0.0)}).items():
        assert (pass_at_k(8, 4, k), pass_hat_k(8, 4, k)) == pytest.approx(figures)


def test_edges():
    assert [f(4, 4, 4) for f in (pass_at_k, pass_hat_k)] == [1.0, 1.0]
    assert [f(4, 0, 1) for f in (pass_at_k, pass_hat_k)] == [0.0, 0.0]
    few = [pass_at_k(3, 3, 4), pass_hat_k(3, 3, 4), best_at_k([1.0] * 3, 4), best_at_k([], 1)]
    assert all(map(math.isnan, few)), "fewer samples than k tell nothing, and are no success"
    assert math.isnan(best_at_k([math.nan, 1.0], 1))
    assert 0 < pass_at_k(5_000, 1, 2_500) == pass_hat_k(2, 1, 1) == 0.5, "binomials beyond a float's range"
    assert pass_at_k(10**4, 1, 1) == 1e-4, "exact, where 1 - (1 - x) loses digits"
