"""Groups are played beside each other, each until all its rollouts have landed, and an error is handed on."""

from __future__ import annotations

import asyncio
import queue
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from test_collect import SAMPLING, Answer, Controller, fine, gateway_that_says, hang, playing, reply, tasks

from gymexp.errors import ServiceError
from gymexp.rollout.collect import Collector, ControllerGone, Stopped
from gymexp.rollout.outcome import Completed, Failed
from gymexp.rollout.progress import Progress

PATIENCE_S = 20


def start(collector: Collector, count: int, landed: Callable[[Any], None]) -> None:
    collector.ahead.start(tasks(count), [SAMPLING] * count, landed)


def result_of(collector: Collector, count: int = 2) -> Any:
    landed: queue.Queue[Any] = queue.Queue()
    start(collector, count, landed.put)
    return landed.get(timeout=PATIENCE_S)


def test_groups_land_as_they_end_with_their_outcomes_in_order_also_beside_a_collection():
    async def last_first(key: str, attempt: int) -> Answer:
        number = int(key[-6:])
        await asyncio.sleep(0.3 if number == 0 else 0.02)
        return reply(reward=float(number))

    landed: queue.Queue[Any] = queue.Queue()
    with playing(last_first) as (collector, _):
        collector.ahead.start(tasks(3), [SAMPLING] * 3, lambda one: landed.put(("slow", one)))
        collector.ahead.start(tasks(3)[1:], [SAMPLING] * 2, lambda one: landed.put(("quick", one)))
        collected = collector.collect(tasks(2), [SAMPLING] * 2)
        results = [landed.get(timeout=PATIENCE_S) for _ in range(2)]
    assert [name for name, _ in results] == ["quick", "slow"]
    rewards = [[outcome.rollout.reward for outcome in outcomes] for _, outcomes in results]
    assert rewards == [[1.0, 2.0], [0.0, 1.0, 2.0]] and len(collected) == 2


def test_a_rollout_that_fails_keeps_its_place_in_its_group_after_its_retries():
    async def one_fails(key: str, attempt: int) -> Answer:
        return (500, "broken") if key.endswith("1") else reply()

    with playing(one_fails, rollout={"max_retries": 1}) as (collector, agent):
        outcomes = result_of(collector, 3)
    assert [type(outcome) for outcome in outcomes] == [Completed, Failed, Completed]
    assert agent.attempts["e/train/000001"] == 2


def test_a_rollout_whose_weights_are_not_known_is_played_again_with_the_same_seed():
    asked: list[int] = []

    def versions_of(plays: list[str]) -> list[list[list[int]] | None]:
        asked.append(len(plays))
        return [None, [[3, 2]]] if len(asked) == 1 else [[[3, 1], [4, 1]]]

    with playing(fine, gateway=gateway_that_says(versions_of)) as (collector, agent):
        outcomes = result_of(collector)
    assert asked == [2, 1]
    assert [outcome.rollout.turns[0].versions for outcome in outcomes] == [[(3, 1), (4, 1)], [(3, 2)]]
    assert Counter(row["key"] for row in agent.asked) == {"e/train/000000": 2, "e/train/000001": 1}
    seeds = [row["responses_create_params"]["metadata"] for row in agent.asked if row["key"].endswith("0")]
    assert all('"seed":5' in str(one).replace(" ", "") for one in seeds)


def test_what_ends_a_group_is_handed_on():
    with playing(fine, gateway=web.Application()) as (collector, _):
        assert isinstance(result_of(collector), ServiceError)
    landed: queue.Queue[Any] = queue.Queue()
    with playing(hang) as (collector, agent):
        start(collector, 2, landed.put)
        while agent.in_flight < 2:
            time.sleep(0.01)
        collector.stop()
        assert isinstance(landed.get(timeout=PATIENCE_S), Stopped)
        assert isinstance(result_of(collector), Stopped), "also a group that is started afterwards"
    controller = Controller(server=10.0)
    with playing(hang, controller=controller) as (collector, agent):
        start(collector, 1, landed.put)
        while agent.in_flight < 1:
            time.sleep(0.01)
        controller.gone = True
        assert isinstance(landed.get(timeout=PATIENCE_S), ControllerGone)


def test_closing_ends_the_groups_in_flight_without_a_result():
    landed: queue.Queue[Any] = queue.Queue()
    began = time.monotonic()
    with playing(hang) as (collector, agent):
        start(collector, 2, landed.put)
        while agent.in_flight < 2:
            time.sleep(0.01)
    assert time.monotonic() - began < 10 and landed.empty()


def test_the_progress_counts_what_was_started_and_has_not_left():
    seen: list[Progress] = []
    with playing(fine, seen=seen) as (collector, _):
        result_of(collector, 3)
        result_of(collector, 2)
        collector.ahead.forget(3)
        until = time.monotonic() + PATIENCE_S
        while not seen or (seen[-1].total, seen[-1].done) != (2, 2):
            assert time.monotonic() < until, seen[-1:]
            time.sleep(0.05)


@pytest.mark.parametrize("limit", [1, 3])
def test_the_limit_of_an_environment_holds_over_all_groups(limit):
    landed: queue.Queue[Any] = queue.Queue()

    async def slow(key: str, attempt: int) -> Answer:
        await asyncio.sleep(0.05)
        return reply()

    with playing(slow, env={"max_concurrency": limit}) as (collector, agent):
        for count in (2, 2, 2):
            start(collector, count, landed.put)
        for _ in range(3):
            landed.get(timeout=PATIENCE_S)
    assert agent.most_in_flight == limit
