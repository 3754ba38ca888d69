"""Interval and tests of a change agree with brute force, with scipy, and with what they promise."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from gymexp.statistics import holm, paired_change, sign_flip_p

rewards = st.floats(-10, 10).map(lambda value: round(value, 3))


def by_task(values) -> dict[str, float]:
    return {f"task {number}": value for number, value in enumerate(values)}


@given(st.lists(rewards, max_size=9))
@example([-0.3, -0.9, 0.9, 0.3])
@example([0.1, 0.1, 0.1, -0.3])
def test_the_sign_flip_test_tries_every_choice_of_signs(differences):
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    expected = sum(value >= observed - 1e-9 for value in sums) / len(sums)
    assert sign_flip_p(np.array(differences)) == pytest.approx(expected)


def test_for_many_tasks_draws_come_near_the_exact_share_and_are_the_same_each_time():
    differences_N = np.random.default_rng(1).normal(0.3, 1.0, 17)
    signs_CN = np.array(list(product((-1, 1), repeat=17)))
    exact = float((abs(signs_CN @ differences_N) >= abs(differences_N.sum()) - 1e-9).mean())
    p = sign_flip_p(differences_N)
    assert p == pytest.approx(exact, abs=0.02) and p == sign_flip_p(differences_N)
    assert 0 < sign_flip_p(np.ones(200)) < 1e-3, "never 0: the data are one of the draws"


@settings(deadline=None)  # the first example imports scipy
@given(st.lists(st.tuples(rewards, rewards), min_size=2, max_size=40))
def test_the_interval_is_students_t_over_the_differences(pairs):
    change = paired_change(by_task(a for a, _ in pairs), by_task(b for _, b in pairs))
    differences = [b - a for a, b in pairs]
    assert change and change.mean == pytest.approx(np.mean(differences), abs=1e-9)
    assert (change.better + change.same + change.worse, change.num_tasks) == (len(pairs), len(pairs))
    if (error := stats.sem(differences)) > 1e-9:
        low, high = stats.t.interval(0.95, len(pairs) - 1, np.mean(differences), error)
        assert (change.low, change.high) == (pytest.approx(low), pytest.approx(high))


@given(st.lists(st.tuples(rewards, rewards), min_size=2, max_size=20))
def test_pairing_gains_what_the_tasks_correlate(pairs):
    """Var(b - a) = Var(a) + Var(b) - 2 r sd(a) sd(b)."""
    before, after = ([pair[i] for pair in pairs] for i in (0, 1))
    change = paired_change(by_task(before), by_task(after))
    sds = np.std(before, ddof=1), np.std(after, ddof=1)
    assert change and change.error == pytest.approx(stats.sem(np.subtract(after, before)), abs=1e-9)
    assert change.unpaired_error == pytest.approx(math.hypot(*sds) / math.sqrt(len(pairs)), abs=1e-9)
    if min(sds) == 0:
        assert change.correlation is None
    elif min(sds) > 1e-6:
        assert change.correlation is not None
        variance = change.unpaired_error**2 - 2 * change.correlation * math.prod(sds) / len(pairs)
        assert change.error**2 == pytest.approx(variance, abs=1e-6)


@pytest.mark.parametrize("num", [6, 40, 500])
def test_a_true_change_of_the_detectable_size_is_found_four_times_of_five(num):
    """By the noncentral t distribution of a change over its error."""
    change = paired_change(by_task([0.0] * num), by_task(np.random.default_rng(2).random(num)))
    assert change
    found = stats.nct.sf(stats.t.ppf(0.975, num - 1), num - 1, change.detectable / change.error)
    assert found == pytest.approx(0.8, abs=0.02)


def test_students_own_data():
    """Ten patients (1908): the second drug gains 1.58 hours of sleep over the first, 0.70 to 2.46."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    change = paired_change(by_task(first), by_task(second))
    assert change and change.mean == pytest.approx(1.58)
    assert (change.low, change.high) == pytest.approx((0.70, 2.46), abs=0.005)


def test_tasks_are_paired_by_key_and_those_without_a_partner_are_left_out():
    before = {"a": 0.0, "b": 1.0, "only before": 9.0}
    after = {"b": 1.0, "a": 0.5, "only after": -9.0}
    change = paired_change(before, after)
    assert change and (change.num_tasks, change.mean, change.better, change.same) == (2, 0.25, 1, 1)
    assert paired_change({"a": 1.0}, {"a": 2.0}) is None and paired_change({}, {}) is None


def test_holms_method_on_its_textbook_example():
    """Aickin and Gensler, "Adjusting for multiple testing when reporting research results" (1996)."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def evaluations(random: np.random.Generator, tasks: int = 120) -> tuple[dict, dict]:
    """Rewards of two evaluations whose tasks differ in difficulty, as success or failure."""
    difficulty_N = random.random(tasks)
    before, after = random.random(tasks) < difficulty_N, random.random(tasks) < difficulty_N
    return by_task(before.astype(float)), by_task(after.astype(float))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(7)
    changes = [paired_change(*evaluations(random)) for _ in range(600)]
    assert np.mean([c.low <= 0 <= c.high for c in changes if c]) == pytest.approx(0.95, abs=0.025)
