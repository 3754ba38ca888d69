"""Intervals over tasks agree with scipy and with published figures, and cover as often as they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gymexp.statistics import mean_over_tasks, reward_interval, success_interval

rewards = st.floats(-10, 10).map(lambda value: round(value, 3))
successes = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=2, max_size=12)


def by_task(values) -> dict:
    return {f"task {number}": value for number, value in enumerate(values)}


def ends(interval) -> tuple[float, float]:
    return interval.low, interval.high


@settings(deadline=None)  # the first example imports scipy
@given(st.lists(st.lists(rewards, min_size=1, max_size=5), min_size=2, max_size=20))
def test_a_reward_has_students_t_over_the_means_of_tasks(samples):
    means = [np.mean(values) for values in samples]
    found = reward_interval(by_task(samples))
    assert found and found.num_tasks == len(samples) and found.mean == pytest.approx(np.mean(means), abs=1e-9)
    if (error := stats.sem(means)) > 1e-9:
        expected = stats.t.interval(0.95, len(means) - 1, np.mean(means), error)
        assert ends(found) == pytest.approx(expected)
    assert mean_over_tasks(by_task(means)) == found


def test_with_equal_numbers_of_samples_the_error_is_millers_for_clusters():
    """arXiv:2411.00640, equation 4, with C / (C - 1) for the number of clusters."""
    rewards_CK = np.random.default_rng(3).random((9, 4))
    centred_CK = rewards_CK - rewards_CK.mean()
    pairs = sum(np.outer(values, values).sum() for values in centred_CK)  # each sample with itself, too
    miller = math.sqrt(pairs) / rewards_CK.size * math.sqrt(9 / 8)
    found = reward_interval(by_task(rewards_CK.tolist()))
    assert found and (found.high - found.low) / 2 == pytest.approx(stats.t.ppf(0.975, 8) * miller)


def test_tasks_without_a_sample_are_left_out_and_one_task_has_no_interval():
    found = reward_interval({"a": [0.0, 1.0], "b": [], "c": [1.0]})
    assert found and (found.mean, found.num_tasks) == (0.75, 2)
    assert success_interval({"a": [True], "b": [], "c": [True]}) == success_interval({"a": [1], "c": [1]})
    for interval in (reward_interval, success_interval):
        assert interval({}) is None and interval({"a": [1.0] * 9}) is interval({"a": [1.0], "b": []}) is None
    assert mean_over_tasks({"a": 1.0, "b": math.nan}) is None


def test_nan_is_left_out_where_it_means_too_few_samples_and_nowhere_else():
    found = mean_over_tasks({"a": 0.0, "b": math.nan, "c": 1.0})
    assert found and (found.mean, found.num_tasks) == (0.5, 2)
    found = reward_interval({"a": [0.0], "b": [math.nan, 1.0], "c": [1.0]})
    assert found and all(map(math.isnan, (found.mean, *ends(found))))


def test_without_variance_the_interval_has_no_width():
    found = reward_interval({"a": [0.0, 1.0], "b": [0.5]})
    assert found and found.mean == found.low == found.high == 0.5


@pytest.mark.parametrize(
    ("good", "num", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_one_sample_of_each_task_gives_wilsons_interval_with_newcombes_figures(good, num, low, high):
    """Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3."""
    found = success_interval(by_task([[number < good] for number in range(num)]))
    assert found and ends(found) == pytest.approx((low, high), abs=5e-5)
    scipys = stats.binomtest(good, num).proportion_ci(method="wilson")
    assert ends(found) == pytest.approx((scipys.low, scipys.high), abs=1e-12)


@settings(deadline=None)
@given(successes)
def test_both_ends_solve_wilsons_equation_for_the_effective_size(samples):
    num, tasks = sum(map(len, samples)), len(samples)
    shares = [sum(values) / len(values) for values in samples]
    share, variance = np.mean(shares), stats.sem(shares) ** 2
    found = success_interval(by_task(samples))
    assert found and found.mean == pytest.approx(share) and 0 <= found.low <= share <= found.high <= 1
    if share in (0, 1):
        size = tasks
    elif variance < 1e-12:
        size = num
    else:
        design_effect = variance / (share * (1 - share) / (num - 1))
        size = num / design_effect * (stats.t.ppf(0.975, num - 1) / stats.t.ppf(0.975, tasks - 1)) ** 2
    z = stats.norm.ppf(0.975)
    for end in ends(found):
        assert (share - end) ** 2 * min(size, num) == pytest.approx(z**2 * end * (1 - end), abs=1e-9)


@settings(deadline=None)
@given(st.integers(2, 5), st.lists(st.booleans(), min_size=2, max_size=30))
def test_copies_of_a_sample_tell_nothing_new(copies, samples):
    once = success_interval(by_task([[value] for value in samples]))
    often = success_interval(by_task([[value] * copies for value in samples]))
    assert once and often and often.low <= once.low + 1e-12 and once.high <= often.high + 1e-12
    assert often.high - often.low < 1.3 * (once.high - once.low)


def test_samples_that_differ_more_than_by_chance_count_as_no_more_than_they_are():
    """Every task is solved in half of its samples."""
    found = success_interval(by_task([[True, False]] * 10))
    scipys = stats.binomtest(10, 20).proportion_ci(method="wilson")
    assert found and ends(found) == pytest.approx((scipys.low, scipys.high))


def test_intervals_cover_the_truth_as_often_as_they_say_where_one_over_samples_does_not():
    """Difficulties of variance 1/8 correlate the four samples of a task by 0.5. So the design effect is 2.5,
    and the interval over all samples covers as often as |z| < 1.96 / sqrt(2.5): 0.785."""
    random, covered = np.random.default_rng(11), []
    for _ in range(600):
        difficulty_N = random.beta(0.5, 0.5, 120)
        samples_NK = random.random((120, 4)) < difficulty_N[:, None]
        t, wilson = (f(by_task(samples_NK.tolist())) for f in (reward_interval, success_interval))
        naive = stats.norm.interval(0.95, samples_NK.mean(), samples_NK.std() / math.sqrt(480))
        assert t and wilson
        covered.append([low <= 0.5 <= high for low, high in (ends(t), ends(wilson), naive)])
    assert np.mean(covered, axis=0) == pytest.approx([0.95, 0.95, 0.785], abs=0.025)
