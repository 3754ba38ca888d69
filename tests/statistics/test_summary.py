"""The summary of an evaluation counts every planned rollout, and its numbers are those of its parts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gymexp.statistics import EnvSummary, mean_over_tasks, reward_interval, success_interval, summarize


def rows(rewards_by_task: dict[str, list[float | None]], **more: Any) -> list[dict[str, Any]]:
    """Lines of the index; a reward of None is a failed rollout."""
    return [
        {"key": key, "outcome": "failed", "cause": "timeout"}
        if reward is None
        else {"key": key, "outcome": "completed", "reward": reward, "turns": 2, "tokens": 10} | more
        for key, rewards in rewards_by_task.items()
        for reward in rewards
    ]


def test_failed_rollouts_are_counted_and_shown_as_zeros_beside_the_scored_ones():
    found = summarize(rows({"a": [1.0, None], "b": [0.5, 1.0], "c": [None, None]}), 8, 1.0)
    assert (found.planned, found.scored, found.failed) == (8, 3, 3), "two were not played"
    assert found.reward == reward_interval({"a": [1.0], "b": [0.5, 1.0]})
    assert found.reward_failures_as_zero == reward_interval(
        {"a": [1.0, 0.0], "b": [0.5, 1.0], "c": [0.0, 0.0]}
    )
    assert found.success == success_interval({"a": [True], "b": [False, True]})
    as_zero = success_interval({"a": [True, False], "b": [False, True], "c": [False, False]})
    assert found.success_failures_as_zero == as_zero
    assert (found.always, found.sometimes, found.never) == (1, 1, 0)


def test_a_failed_rollout_is_no_success_where_a_reward_of_zero_is_one():
    found = summarize(rows({"a": [0.0, None], "b": [-1.0, 0.0]}), 4, 0.0)
    assert found.success == success_interval({"a": [True], "b": [False, True]})
    assert found.success_failures_as_zero == success_interval({"a": [True, False], "b": [False, True]})


def test_k_are_powers_of_two_over_the_tasks_with_enough_samples():
    found = summarize(
        rows({"a": [1.0, 0.0, 0.0, 0.0], "b": [1.0, 1.0, 0.0, None], "c": [0.0] * 4, "d": [1.0] * 5}), 20, 1.0
    )
    assert found.pass_at == {
        1: mean_over_tasks({"a": 1 / 4, "b": 2 / 3, "c": 0.0, "d": 1.0}),
        2: mean_over_tasks({"a": 1 / 2, "b": 1.0, "c": 0.0, "d": 1.0}),
        4: mean_over_tasks({"a": 1.0, "c": 0.0, "d": 1.0}),
    }
    assert found.pass_hat[2] == mean_over_tasks({"a": 0.0, "b": 1 / 3, "c": 0.0, "d": 1.0})
    assert found.best_at == found.pass_at, "for rewards of 0 and 1"
    assert (found.always, found.sometimes, found.never) == (1, 2, 1)
    assert list(summarize(rows({"a": [1.0] * 4, "b": [0.0] * 3}), 8, 1.0).pass_at) == [1, 2], "one has four"


def test_deviations_are_those_of_the_analysis_of_variance():
    random = np.random.default_rng(5)
    rewards_NK = random.normal(0, 0.3, (40, 1)) + random.normal(0, 0.2, (40, 6))
    found = summarize(rows({str(n): values for n, values in enumerate(rewards_NK.tolist())}), 240, 1.0)
    assert found.between_tasks and found.between_samples and found.reward
    ratio = stats.f_oneway(*rewards_NK).statistic  # of the mean squares between and within tasks
    between, within = found.between_tasks**2, found.between_samples**2
    assert 1 + 6 * between / within == pytest.approx(ratio)
    assert (found.between_tasks, found.between_samples) == pytest.approx((0.3, 0.2), rel=0.2)
    error = math.sqrt((between + within / 6) / 40)
    assert (found.reward.high - found.reward.low) / 2 == pytest.approx(stats.t.ppf(0.975, 39) * error)


def test_deviations_are_unknown_without_a_second_sample_and_at_least_zero():
    found = summarize(rows({"a": [0.0], "b": [1.0]}), 2, 1.0)
    assert found.between_tasks is found.between_samples is None
    found = summarize(rows({"a": [0.0, 1.0], "b": [1.0, 0.0]}), 4, 1.0)
    assert (found.between_tasks, found.between_samples) == (0.0, pytest.approx(math.sqrt(0.5)))


def test_turns_tokens_and_truncated_are_over_the_scored_rollouts():
    some = [
        {"key": f"task {n}", "outcome": outcome, "reward": 0.0, "turns": n, "tokens": 10 * n}
        for n, outcome in enumerate(["truncated", "completed", "completed", "completed", "truncated"])
    ]
    found = summarize([*some, {"key": "task 9", "outcome": "failed"}], 6, 1.0)
    assert (found.turns, found.tokens_p50, found.tokens_p95) == (2.0, 20.0, pytest.approx(38.0))
    assert found.truncated == 0.4


def test_an_evaluation_without_a_scored_rollout_has_no_numbers_but_its_counts():
    empty: Any = dict.fromkeys(EnvSummary.__dataclass_fields__)
    empty |= {"planned": 4, "scored": 0, "failed": 0, "always": 0, "sometimes": 0, "never": 0}
    empty |= {"pass_at": {}, "pass_hat": {}, "best_at": {}}
    assert summarize([], 4, 1.0) == EnvSummary(**empty)
    found = summarize(rows({"a": [None], "b": [None]}), 4, 1.0)
    assert (found.failed, found.reward, found.truncated) == (2, None, None)
    assert found.reward_failures_as_zero and found.reward_failures_as_zero.mean == 0.0
