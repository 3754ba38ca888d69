"""The numbers about a batch, by environment, with failures counted and never averaged in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gymexp.config.schema import EnvConfig
from gymexp.rollout.outcome import Cause, Completed, Failed, Outcome, Rollout, Task, Truncated, Turn
from gymexp.training.metrics import group_metrics, rollout_metrics, staleness_metrics

ENVS = {
    "a": EnvConfig(config_path="c", agent="x"),
    "b": EnvConfig(config_path="c", agent="x", success_reward=0.5),
}


def task(env: str, number: int = 0) -> Task:
    return Task(f"{env}/train/{number:06d}", env, "x", {})


def played(
    env: str,
    reward: float,
    turns: int = 1,
    number: int = 0,
    cut: bool = False,
    failures: Sequence[Cause] = (),
) -> Outcome:
    sampled = [Turn([1], [2, 3], [-0.1, -0.2])] * turns
    rollout = Rollout(task(env, number), sampled, reward, [], seconds={"total": 2.0})
    return Truncated(rollout, "turns", list(failures)) if cut else Completed(rollout, failures=list(failures))


def failed(env: str, number: int = 0) -> Failed:
    return Failed(task(env, number), "engine", "gone", failures=["token_mismatch", "engine", "engine"])


def test_each_environment_has_its_own_numbers():
    metrics = rollout_metrics(
        [
            played("a", 1.0, failures=["token_mismatch"]),
            played("a", 0.0, turns=3, cut=True),
            played("b", 0.5),
            failed("b"),
        ],
        ENVS,
    )
    assert metrics == {
        "a/rollouts": 2,
        "a/failed": 0,
        "a/prompts_too_long": 0,
        "a/refused": 0,
        "a/truncated": 0.5,
        "a/failed_environment": 0,
        "a/failed_engine": 0,
        "a/failed_timeout": 0,
        "a/failed_token_mismatch": 0,
        "a/truncated_length": 0,
        "a/truncated_turns": 0.5,
        "a/retried": 0.5,
        "a/token_mismatches": 1,
        "a/reward": 0.5,
        "a/reward_std": 0.5,
        "a/success": 0.5,
        "a/replicas": 1,
        "a/turns": 2,
        "a/tokens": 4,
        "a/seconds": 2.0,
        "a/nll": pytest.approx(0.15),
        "a/tool_calls": 0,
        "a/tool_errors": 0,
        "b/rollouts": 2,
        "b/failed": 0.5,
        "b/prompts_too_long": 0,
        "b/refused": 0,
        "b/truncated": 0,
        "b/failed_environment": 0,
        "b/failed_engine": 0.5,
        "b/failed_timeout": 0,
        "b/failed_token_mismatch": 0,
        "b/truncated_length": 0,
        "b/truncated_turns": 0,
        "b/retried": 1,
        "b/token_mismatches": 1,
        "b/reward": 0.5,
        "b/reward_std": 0,
        "b/success": 1,
        "b/replicas": 1,
        "b/turns": 1,
        "b/tokens": 2,
        "b/seconds": 2.0,
        "b/nll": pytest.approx(0.15),
        "b/tool_calls": 0,
        "b/tool_errors": 0,
    }


def test_an_environment_that_only_failed_has_no_reward_to_show():
    assert rollout_metrics([failed("a")] * 3, ENVS) == {
        "a/rollouts": 3,
        "a/failed": 1,
        "a/prompts_too_long": 0,
        "a/refused": 0,
        "a/truncated": 0,
        "a/failed_environment": 0,
        "a/failed_engine": 1,
        "a/failed_timeout": 0,
        "a/failed_token_mismatch": 0,
        "a/truncated_length": 0,
        "a/truncated_turns": 0,
        "a/retried": 2,
        "a/token_mismatches": 3,
    }


@given(st.lists(st.floats(-1, 1) | st.none(), min_size=1), st.randoms())
def test_failures_change_no_mean_and_order_changes_nothing(rewards, random):
    outcomes = [failed("a") if r is None else played("a", r) for r in rewards]
    metrics = rollout_metrics(outcomes, ENVS)
    scored = [o for o in outcomes if not isinstance(o, Failed)]
    assert metrics["a/failed"] == pytest.approx(1 - len(scored) / len(outcomes))
    if scored:
        assert metrics["a/reward"] == pytest.approx(rollout_metrics(scored, ENVS)["a/reward"])
    random.shuffle(outcomes)
    assert rollout_metrics(outcomes, ENVS) == pytest.approx(metrics)


def test_groups_are_counted_by_kind_for_each_environment():
    outcomes = [
        *(played("a", r, number=1) for r in (1.0, 0.0)),
        *(played("a", r, number=2) for r in (1.0, 1.0)),
        *(played("b", r, number=1) for r in (0.5, 0.5)),
        *(played("b", r, number=2) for r in (0.3, 0.3)),
        *(played("b", 0.3, number=3), failed("b", number=3)),
        *(failed("b", number=4), failed("b", number=4)),
    ]
    assert group_metrics(outcomes, 2, ENVS) == {
        "groups_without_variance": pytest.approx(5 / 6),
        "a/groups_mixed": 0.5,
        "a/groups_all_solved": 0.5,
        "a/groups_none_solved": 0,
        "a/groups_failed": 0,
        "b/groups_mixed": 0,
        "b/groups_all_solved": 0.25,
        "b/groups_none_solved": 0.25,
        "b/groups_failed": 0.5,
    }
    assert math.isnan(group_metrics([], 2, ENVS)["groups_without_variance"])


def test_two_groups_of_one_task_are_two_groups():
    rewards = (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)
    metrics = group_metrics([played("a", r) for group in rewards for r in group], 2, ENVS)
    assert metrics["groups_without_variance"] == pytest.approx(2 / 3)
    assert metrics["a/groups_mixed"] == pytest.approx(1 / 3)


def test_tool_calls_their_errors_and_the_mean_of_all_sampled_tokens_log_probabilities_are_counted():
    output = {"type": "function_call_output", "output": '{"detail":"Not Found"}'}
    calls = [{"type": "function_call"}, output, {"type": "function_call"}]
    turns = [Turn([1], [2], [-1.0]), Turn([1], [2, 3, 4], [-0.2, -0.2, -0.2])]
    rollout = Completed(Rollout(task("a"), turns, 1.0, calls))
    metrics = rollout_metrics([rollout, played("a", 0.0)], ENVS)
    assert (metrics["a/tool_calls"], metrics["a/tool_errors"]) == (1, 0.5)
    assert metrics["a/nll"] == pytest.approx(1.9 / 6)


def test_rewards_as_large_as_float32_holds_have_a_mean_and_a_deviation():
    metrics = rollout_metrics(
        [played("a", 3e38), played("a", 3e38), played("b", 3e38), played("b", -3e38)], ENVS
    )
    assert (metrics["a/reward"], metrics["a/reward_std"]) == (3e38, 0.0)
    assert (metrics["b/reward"], metrics["b/reward_std"]) == (0.0, 3e38)


def test_what_the_environment_refused_and_prompts_without_room_are_counted_apart_from_failures():
    refused = Completed(Rollout(task("a", 0), [Turn([1], [2], [-0.1])], -1.0, [], refused="400: no action"))
    too_long = Failed(task("a", 1), "prompt_too_long", "no room", failures=["prompt_too_long"])
    metrics = rollout_metrics([refused, too_long, played("a", 1.0), failed("a")], ENVS)
    assert (metrics["a/refused"], metrics["a/prompts_too_long"], metrics["a/failed"]) == (0.25, 0.25, 0.25)
    assert metrics["a/reward"] == 0.0


def sampled_by(*turns: list[tuple[int, int]]) -> Outcome:
    made = [Turn([1], [2] * sum(n for _, n in spans), [], spans) for spans in turns]
    return Completed(Rollout(task("a"), made, 1.0, []))


def test_staleness_is_counted_by_sampled_token_and_split_into_play_and_wait():
    outcomes = [
        sampled_by([(3, 10)], [(3, 5), (5, 4)]),  # the second turn was cut by two updates
        sampled_by([(6, 1)]),
        sampled_by([(6, 90)], []),  # a turn of unknown weights
        failed("a"),
    ]
    metrics = staleness_metrics(outcomes, 6, 4)
    assert metrics == {
        "staleness/tokens_0": 1 / 20,
        "staleness/tokens_1": 4 / 20,
        "staleness/tokens_2": 0,
        "staleness/tokens_3": 15 / 20,
        "staleness/tokens_4": 0,
        "staleness/mean": (15 * 3 + 4 * 1) / 20,
        "staleness/max": 3,
        "staleness/p95": 3,
        "staleness/in_flight": (2 + 0) / 2,
        "staleness/in_queue": (1 + 0) / 2,
        "overlap/turns_cut": 1,
    }
    assert staleness_metrics([sampled_by([(9, 19), (8, 1)])], 9, 1)["staleness/p95"] == 0
    assert staleness_metrics([failed("a")], 6, 4) == {}
