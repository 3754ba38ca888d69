"""The tasks that a curriculum draws, against what its docstring promises."""

from __future__ import annotations

import json
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gymexp.config.schema import DatasetConfig
from gymexp.data.curriculum import Curriculum, count_tasks, draws_tasks, from_json, to_json
from gymexp.data.weights import PARTS, Weights

WEIGHT = st.sampled_from([0.1, 0.25, 1 / 3, 1, 2, 3.7])


def keys(env: str, count: int) -> list[str]:
    return [f"{env}/train/{index:06d}" for index in range(count)]


def of(batch: list[str]) -> Counter[str]:
    return Counter(key.split("/")[0] for key in batch)


def curriculum(num_tasks=10, weights=None, by_difficulty=True, seed=0) -> Curriculum:
    return Curriculum(
        {"a": keys("a", num_tasks), "b": keys("b", 7)},
        weights or Weights({"a": 1, "b": 1}),
        seed,
        by_difficulty,
    )


def play(one: Curriculum, step: int, flat: object = lambda key: False, count: int = 6) -> list[str]:
    batch = one.draw(step, count)
    one.learn([flat(key) for key in batch])  # type: ignore[operator]
    return batch


def test_a_weight_is_linear_between_two_steps_and_stays_after_the_last():
    schedule = {10: {"a": 1, "b": 0}, 20: {"a": 0.5, "b": 0.2}, 21: {"a": 0, "b": 3}}
    weights = Weights({"a": 1, "b": 1, "c": 2}, schedule)
    at = {step: tuple(map(float, weights.at(step).values())) for step in (0, 10, 15, 18, 20, 21, 10**6)}
    assert at == {
        0: (1, 0, 2),
        10: (1, 0, 2),
        15: (0.75, 0.1, 2),
        18: (0.6, 0.16, 2),
        20: (0.5, 0.2, 2),
        21: (0, 3, 2),
        10**6: (0, 3, 2),
    }
    assert Weights({"a": 1, "b": 0}).ever() == ["a"]
    assert Weights({"a": 1, "b": 1}, {0: {"b": 0}, 5: {"b": 0}}).ever() == ["a"]


@settings(deadline=None)
@given(st.lists(WEIGHT | st.just(0), min_size=1, max_size=6), st.integers(0, 50))
def test_shares_are_whole_parts_that_add_up(values, step):
    values[0] = values[0] or 1
    first = {f"e{n}": value for n, value in enumerate(values)}
    shares = Weights({}, {0: first, 37: dict(zip(first, reversed(values), strict=True))}).shares(step)
    assert sum(shares.values()) == PARTS and min(shares.values()) >= 0


@settings(deadline=None)
@given(st.lists(st.lists(WEIGHT, min_size=4, max_size=4), min_size=1, max_size=4), st.integers(1, 9))
def test_an_environment_stays_near_the_sum_of_its_shares_while_the_weights_change(points, count):
    schedule = {7 * n: {f"e{i}": w for i, w in enumerate(values)} for n, values in enumerate(points)}
    weights, envs = Weights(dict.fromkeys(schedule[0], 1), schedule), list(schedule[0])
    made = Curriculum({env: keys(env, 5) for env in envs}, weights, 0, True)
    drawn, owed = Counter(), dict.fromkeys(envs, Fraction(0))
    for step in range(30):
        drawn += of(play(made, step, count=count))
        at = weights.at(step)
        for env in envs:
            owed[env] += at[env] / sum(at.values()) * count
            assert -1 - 1e-6 < owed[env] - drawn[env] < len(envs) - 1 + 1e-6
    assert count_tasks(weights, envs, range(30), count) == drawn


def test_an_environment_of_weight_0_gets_no_task_and_its_share_grows_as_the_schedule_says():
    weights = Weights({"a": 1, "b": 1}, {0: {"a": 1, "b": 0}, 10: {"a": 1, "b": 0}, 30: {"a": 0, "b": 1}})
    made = curriculum(weights=weights)
    counts = [of(play(made, step, count=20))["b"] for step in range(40)]
    assert counts[:11] == [0] * 11 and counts[30:] == [20] * 10
    assert counts[20] == pytest.approx(10, abs=1) and sum(counts[11:30]) == pytest.approx(190, abs=1)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.booleans())
def test_a_round_has_each_task_once_and_the_next_another_order(num_tasks, count, by_difficulty):
    made = Curriculum({"a": keys("a", num_tasks)}, Weights({"a": 1}), 0, by_difficulty)
    order = [key for step in range(80) for key in play(made, step, count=count)]
    rounds = [order[i : i + num_tasks] for i in range(0, len(order) - num_tasks, num_tasks)]
    assert all(sorted(one) == keys("a", num_tasks) for one in rounds)
    if num_tasks > 8 and len(rounds) > 1:
        assert rounds[0] != rounds[1]


def test_uniform_sampling_does_not_look_at_the_results():
    made, other = curriculum(by_difficulty=False), curriculum(by_difficulty=False)
    for step in range(20):
        assert play(made, step, lambda key: True) == play(other, step, lambda key: None)


def rounds_of(key: str, flat, num_rounds: int = 70) -> list[int]:
    """The rounds in which a task is played, of an environment whose other tasks are never at rest."""
    made = Curriculum({"a": keys("a", 4)}, Weights({"a": 1}), 0, True)
    other = next(one for one in keys("a", 4) if one != key)
    seen, number = [], -1
    while number < num_rounds:
        (played,) = made.draw(0, 1)
        number += played == other
        number_now = made.snapshot().queues["a"].round
        if played == key:
            seen.append(number_now)
        made.learn([flat(len(seen)) if played == key else False])
    return seen


def test_a_task_with_equal_rewards_comes_back_after_2_4_8_16_and_32_rounds_and_then_every_32():
    assert rounds_of("a/train/000002", lambda times: True, 100) == [0, 2, 6, 14, 30, 62, 94]


def test_different_rewards_end_its_rests_and_a_failed_group_says_nothing():
    seen = rounds_of(
        "a/train/000002", lambda times: {1: True, 2: True, 3: False, 4: None}.get(times, True), 20
    )
    assert seen == [0, 2, 6, 7, 8, 10, 14]


def test_tasks_that_all_rest_come_back_at_once_the_first_to_return_first():
    made = Curriculum({"a": keys("a", 3)}, Weights({"a": 1}), 0, True)
    order = [key for step in range(9) for key in play(made, step, lambda key: True, count=1)]
    assert [sorted(order[i : i + 3]) for i in (0, 3, 6)] == [keys("a", 3)] * 3
    assert made.metrics(0)["a"] == {"weight": 1, "share": 0, "resting": 3}


def test_the_tasks_that_teach_get_the_batches_and_none_is_given_up():
    """Half of the tasks are always solved; of the others every result differs."""
    made = Curriculum({"a": keys("a", 40)}, Weights({"a": 1}), 0, True)
    easy = set(keys("a", 20))
    played = Counter(key for step in range(200) for key in play(made, step, lambda key: key in easy, 8))
    assert sum(played[key] for key in easy) < 0.15 * played.total()
    assert min(played[key] for key in keys("a", 40)) >= 2
    assert 15 <= made.metrics(0)["a"]["resting"] <= 20


@settings(deadline=None)
@given(st.integers(0, 25), st.integers(0, 3), st.booleans())
def test_a_state_that_went_through_json_goes_on_alike(stop, seed, by_difficulty):
    weights = Weights({"a": 1, "b": 1}, {0: {"a": 1, "b": 0}, 20: {"a": 0.2, "b": 1}})
    results = random.Random(seed)
    given_ = [{key: results.choice([True, False, None]) for key in keys("a", 10) + keys("b", 7)}] * 50
    one = curriculum(weights=weights, by_difficulty=by_difficulty, seed=seed)
    whole = [play(one, step, given_[step].get) for step in range(50)]
    other = curriculum(weights=weights, by_difficulty=by_difficulty, seed=seed)
    for step in range(stop):
        play(other, step, given_[step].get)
    resumed = curriculum(weights=weights, by_difficulty=by_difficulty, seed=seed)
    resumed.restore(from_json(json.loads(json.dumps(to_json(other.snapshot())))))
    assert [play(resumed, step, given_[step].get) for step in range(stop, 50)] == whole[stop:]
    assert resumed.metrics(50) == one.metrics(50)


def test_a_snapshot_does_not_change_with_later_draws():
    made = curriculum()
    play(made, 0, lambda key: True)
    before = made.snapshot()
    first = [play(made, step, lambda key: True) for step in range(5)]
    made.restore(before)
    assert [play(made, step, lambda key: True) for step in range(5)] == first


def test_another_seed_is_another_order():
    assert play(curriculum(seed=1), 0) != play(curriculum(seed=2), 0)


@pytest.mark.parametrize(
    ("changes", "draws"),
    [({}, False), ({"schedule": {"sudoku": [[0, 1]]}}, True), ({"sampling": "difficulty"}, True)],
    ids=str,
)
def test_a_schedule_and_sampling_by_difficulty_are_curricula(changes, draws):
    assert draws_tasks(DatasetConfig(**changes)) is draws
