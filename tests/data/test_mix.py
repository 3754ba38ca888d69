from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gymexp.data.mix import describe, epoch_order, keys_sha256, mix, share_out
from gymexp.errors import DataError
from gymexp.rollout.outcome import Task

SIZES = st.none() | st.integers(1, 300)
ORDERS = st.sampled_from(["interleave", "shuffle"])


def tasks(env: str, count: int) -> list[Task]:
    return [Task(f"{env}/train/{index:06d}", env, f"{env}_agent", {}) for index in range(count)]


@st.composite
def mixes(draw, sizes=SIZES, max_envs=4):
    """tasks_by_env, weights and size, as `mix` takes them; at least one weight is above 0."""
    names = [f"env{n}" for n in range(draw(st.integers(1, max_envs)))]
    available = {name: tasks(name, draw(st.integers(20, 60))) for name in names}
    weights = {name: draw(st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 1.0, 2.0, 3.7])) for name in names}
    weights["env0"] = weights["env0"] or 1.0
    return available, weights, draw(sizes)


@given(mixes(), ORDERS, st.integers(0, 3))
def test_each_environment_has_its_share_to_within_one_task(made, order, seed):
    available, weights, size = made
    mixed = mix(available, weights, size, order, seed)
    assert size in (None, len(mixed))
    used, total = Counter(task.env for task in mixed), sum(weights.values())
    assert all(abs(used[env] - weights[env] / total * len(mixed)) < 1 + 1e-9 for env in available)
    assert all(used[env] == 0 for env in available if weights[env] == 0)


@given(mixes(sizes=st.none()), ORDERS)
def test_without_a_size_no_task_comes_twice_and_one_more_would_not_fit(made, order):
    available, weights, _ = made
    mixed = mix(available, weights, None, order, 0)
    assert len({task.key for task in mixed}) == len(mixed)
    exact = {env: Fraction(str(weight)) for env, weight in weights.items() if weight}
    share = {env: weight / sum(exact.values()) for env, weight in exact.items()}
    assert any(share[env] * (len(mixed) + 1) > len(available[env]) for env in share)


@given(mixes(sizes=st.integers(100, 400)), ORDERS)
def test_tasks_repeat_in_whole_epochs(made, order):
    available, weights, size = made
    times = Counter(task.key for task in mix(available, weights, size, order, 0))
    for env in (env for env in available if weights[env]):
        of_env = [times[task.key] for task in available[env]]
        assert max(of_env) - min(of_env) <= 1


@given(mixes())
def test_interleaving_keeps_every_beginning_within_one_task_of_the_shares(made):
    available, weights, size = made
    mixed = mix(available, weights, size, "interleave", 0)
    counts, used = Counter(task.env for task in mixed), Counter()
    for position, task in enumerate(mixed, start=1):
        used[task.env] += 1
        assert all(abs(used[e] - Fraction(counts[e] * position, len(mixed))) < 1 for e in counts)


@given(mixes(max_envs=2), st.integers(1, 40))
def test_with_two_environments_every_window_is_within_one_task_of_the_shares(made, width):
    available, weights, size = made
    mixed = mix(available, weights, size, "interleave", 0)
    counts = Counter(task.env for task in mixed)
    for start in range(len(mixed) - width + 1):
        window = Counter(task.env for task in mixed[start : start + width])
        assert all(abs(window[e] - Fraction(counts[e] * width, len(mixed))) <= 1 for e in counts)


@given(mixes(sizes=st.integers(1, 300)), st.integers(0, 3))
def test_an_environments_own_order_does_not_depend_on_the_others(made, seed):
    available, weights, size = made
    mixed = [task.key for task in mix(available, weights, size, "interleave", seed) if task.env == "env0"]
    alone = [task.key for task in mix({"env0": available["env0"]}, weights, size, "interleave", seed)]
    assert mixed == alone[: len(mixed)]


def through_epochs(mixed: list[Task], order: str, seed: int, epochs: int = 3) -> list[Task]:
    return [mixed[index] for epoch in range(epochs) for index in epoch_order(mixed, epoch, order, seed)]


@given(mixes(), ORDERS, st.integers(0, 3))
def test_every_epoch_has_the_same_tasks_and_the_first_is_the_mix_itself(made, order, seed):
    available, weights, size = made
    mixed = mix(available, weights, size, order, seed)
    assert epoch_order(mixed, 0, order, seed) == list(range(len(mixed)))
    for epoch in (1, 2, 7):
        indices = epoch_order(mixed, epoch, order, seed)
        assert sorted(indices) == list(range(len(mixed)))
        assert indices == epoch_order(mixed, epoch, order, seed)


@given(mixes(sizes=st.integers(30, 300)), ORDERS, st.integers(0, 3))
def test_no_two_epochs_and_no_two_seeds_have_the_same_order(made, order, seed):
    available, weights, size = made
    mixed = mix(available, weights, size, order, seed)
    orders = [epoch_order(mixed, epoch, order, seed) for epoch in range(4)]
    orders += [epoch_order(mixed, epoch, order, seed + 1) for epoch in range(1, 4)]
    assert len(set(map(tuple, orders))) == 7


@given(mixes())
def test_interleaving_keeps_the_shares_from_the_first_task_on_through_any_number_of_epochs(made):
    available, weights, size = made
    mixed = mix(available, weights, size, "interleave", 0)
    counts, used = Counter(task.env for task in mixed), Counter()
    for position, task in enumerate(through_epochs(mixed, "interleave", 0), start=1):
        used[task.env] += 1
        assert all(abs(used[e] - Fraction(counts[e] * position, len(mixed))) < 1 for e in counts)


@given(mixes(max_envs=2), st.integers(1, 40))
def test_with_two_environments_a_window_over_an_epochs_end_is_within_one_task_as_well(made, width):
    available, weights, size = made
    mixed = mix(available, weights, size, "interleave", 0)
    counts, order = Counter(task.env for task in mixed), through_epochs(mixed, "interleave", 0)
    for start in range(len(order) - width + 1):
        window = Counter(task.env for task in order[start : start + width])
        assert all(abs(window[e] - Fraction(counts[e] * width, len(mixed))) <= 1 for e in counts)


@given(mixes(sizes=st.integers(100, 400)), st.integers(1, 3))
def test_in_every_epoch_a_task_comes_again_only_after_all_others_of_its_environment(made, epoch):
    available, weights, size = made
    mixed = mix(available, weights, size, "interleave", 0)
    order = [mixed[index] for index in epoch_order(mixed, epoch, "interleave", 0)]
    for env, tasks_of_env in available.items():
        keys = [task.key for task in order if task.env == env]
        whole = len(keys) // len(tasks_of_env) * len(tasks_of_env)
        for start in range(0, whole, len(tasks_of_env)):
            assert len(set(keys[start : start + len(tasks_of_env)])) == len(tasks_of_env)
        assert len(set(keys[whole:])) == len(keys) - whole


def test_later_epochs_are_the_same_on_every_machine():
    available = {"a": tasks("a", 30), "b": tasks("b", 30)}
    found = {}
    for order in ("interleave", "shuffle"):
        mixed = mix(available, {"a": 1, "b": 2}, 40, order, 7)
        found[order] = keys_sha256(through_epochs(mixed, order, 7)[40:])[:12]
    assert found == {"interleave": "67c80d7b2839", "shuffle": "5fea7b489453"}


def test_the_order_is_the_same_on_every_machine():
    available = {"a": tasks("a", 30), "b": tasks("b", 30)}
    found = {
        order: keys_sha256(mix(available, {"a": 1, "b": 2}, 40, order, 7))[:12]
        for order in ("interleave", "shuffle")
    }
    assert found == {"interleave": "2373c1af4bd4", "shuffle": "f7d9ba7df7ee"}


def test_another_seed_is_another_order_of_the_same_tasks():
    available, weights = {"a": tasks("a", 30)}, {"a": 1.0}
    one, two = (mix(available, weights, None, "interleave", seed) for seed in (0, 1))
    assert one != two and set(map(id, one)) == set(map(id, two))


def test_decimal_weights_are_exact():
    assert share_out({"a": 100, "b": 300}, {"a": 0.1, "b": 0.3}, None) == {"a": 100, "b": 300}


@pytest.mark.parametrize(
    ("available", "weights", "size", "reason"),
    [
        ({"a": 0, "b": 5}, {"a": 1, "b": 1}, None, "env.a has weight 1 but no training tasks"),
        ({"a": 5}, {"a": 0}, None, "must be > 0 for at least one environment"),
    ],
)
def test_an_impossible_mix_is_refused(available, weights, size, reason):
    with pytest.raises(DataError, match=reason):
        share_out(available, weights, size)


def test_the_description_says_what_was_used_how_often():
    available, weights = (
        {"a": tasks("a", 10), "b": tasks("b", 40), "c": tasks("c", 5)},
        {"a": 1.0, "b": 1.0, "c": 0.0},
    )
    mixed = mix(available, weights, 50, "interleave", 3)
    stated = describe(mixed, available, weights, "interleave", 3)
    assert stated["envs"]["a"] == {
        "weight": 1.0,
        "available": 10,
        "in_epoch": 25,
        "repeats": 15,
        "share": 0.5,
    }
    assert stated["envs"]["b"]["repeats"] == 0 and stated["envs"]["c"]["in_epoch"] == 0
    assert (stated["order"], stated["seed"], stated["size"]) == ("interleave", 3, 50)
    assert stated["sha256"] == keys_sha256(mixed)
