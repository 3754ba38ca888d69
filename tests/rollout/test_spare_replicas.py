"""How many replicas the environments get, by a model of servers and of a policy; and who asks for them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gymexp.rollout.outcome import Completed, Failed, Rollout, Task
from gymexp.rollout.spare_replicas import Pace, ReplicaCounts, paces_of

Seconds = Callable[[dict[str, int]], dict[str, float]]


def play(counts: ReplicaCounts, seconds: Seconds, times: int) -> list[dict[str, int]]:
    """The counts after each of so many collections of 64 rollouts an environment."""
    after = []
    for _ in range(times):
        now = counts.counts
        paces = {env: Pace(64, took, now.get(env, 1)) for env, took in seconds(now).items()}
        after.append(counts.after(paces))
    return after


def bound_by_servers(**seconds: float) -> Seconds:
    """seconds: with one replica."""
    return lambda counts: {env: took / counts.get(env, 1) for env, took in seconds.items()}


def test_the_slowest_gets_the_cores_until_another_is_the_slowest():
    counts = ReplicaCounts({"a": 8, "b": 8, "c": 8})
    assert play(counts, bound_by_servers(a=40, b=12, c=1), 6)[-1] == {"a": 5, "b": 2, "c": 1}
    assert play(ReplicaCounts({"a": 8}), bound_by_servers(a=40), 5) == [{"a": n} for n in (2, 4, 8, 8, 8)]


def test_an_environment_that_more_replicas_do_not_help_goes_back_and_is_tried_seldom():
    policy_bound = play(ReplicaCounts({"a": 8}), lambda counts: {"a": 10.0}, 60)
    tried = [number for number, counts in enumerate(policy_bound) if counts["a"] == 2]
    assert all(counts["a"] in (1, 2) for counts in policy_bound)
    assert tried == [0, 9, 26, 59], "after 8, 16 and 32 collections"


def test_an_environment_with_a_number_of_its_own_is_left_alone():
    counts = ReplicaCounts({"a": 8})
    assert play(counts, bound_by_servers(fixed=100, a=1), 4)[-1] == {"a": 1}


def test_an_environment_that_ends_early_gives_one_to_the_slowest():
    counts = ReplicaCounts({"a": 4, "b": 4})
    play(counts, bound_by_servers(a=40, b=1), 5)
    assert counts.counts == {"a": 3, "b": 1}
    assert play(counts, bound_by_servers(a=3, b=40), 3)[-1] == {"a": 1, "b": 3}


def test_without_memory_the_count_is_what_there_is():
    counts = ReplicaCounts({"a": 8})
    play(counts, bound_by_servers(a=40), 2)
    counts.taken_back("a", 3)
    assert play(counts, bound_by_servers(a=40), 5) == [{"a": 3}] * 5


def test_a_replica_that_is_still_starting_is_not_judged():
    counts = ReplicaCounts({"a": 4})
    assert counts.after({"a": Pace(64, 10.0, 1)}) == {"a": 2}
    assert counts.after({"a": Pace(64, 10.0, 1)}) == {"a": 2}, "the second has played nothing"
    assert counts.after({"a": Pace(1, 0.2, 1)}) == {"a": 1}, "where one rollout is all, one replica is enough"


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 16), st.integers(0, 9))
def test_there_are_never_more_than_cores_nor_less_than_one(num_envs, cores, seed):
    names = [f"e{n}" for n in range(num_envs)]
    counts, draws = ReplicaCounts(dict.fromkeys(names, cores)), random.Random(seed)
    for _ in range(60):
        played = draws.sample(names, draws.randint(0, num_envs))
        paces = {
            env: Pace(draws.randint(1, 99), draws.uniform(0.1, 50), draws.randint(1, 9)) for env in played
        }
        after = counts.after(paces)
        assert sum(after.values()) <= max(cores, num_envs) and min(after.values()) >= 1
        assert max(after.values()) <= cores


def test_the_pace_is_from_the_collections_begin_to_the_last_rollouts_end():
    task = Task("a/train/0", "a", "x", {})

    def seconds(number: int) -> dict[str, float]:
        return {"queue": number, "total": 5.0}

    made = [
        Completed(Rollout(task, [], 1.0, [], began=100.0 + n, seconds=seconds(n), replica=f"a-{n % 2}"))
        for n in range(4)
    ]
    assert paces_of([*made, Failed(task, "timeout", "")]) == {"a": Pace(4, pytest.approx(8.0), 2)}
    assert paces_of([Failed(task, "timeout", "")]) == {}
