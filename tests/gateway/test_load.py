"""The load of engines against a count in small steps of time, over random patterns."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from gymexp.engine.engine_load import EngineLoad
from gymexp.errors import ServiceError
from gymexp.gateway.load import Load

URLS = ("a", "b")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def play(rng: random.Random, clock: Clock, loads: list[Load]) -> tuple[dict[str, float], dict[str, float]]:
    """Begins and ends requests at random over 50 s, with pauses; returns the busy seconds of each engine, and
    the seconds of its requests, counted second by second over all gateways."""
    busy, requests = dict.fromkeys(URLS, 0.0), dict.fromkeys(URLS, 0.0)
    for _ in range(50):
        for load in loads:
            for url in URLS:
                if load.in_flight[url] and rng.random() < 0.5:
                    load.change(url, -1)
                if rng.random() < 0.3:
                    load.change(url, 1)
        for url in URLS:
            count = sum(load.in_flight[url] for load in loads)
            busy[url] += bool(count)
            requests[url] += count
        clock.now += 1.0
    return busy, requests


@pytest.mark.parametrize("seed", range(10))
def test_sums_are_those_of_each_second(seed):
    clock = Clock()
    load = Load(URLS, clock)
    clock.now += 3
    busy, requests = play(random.Random(seed), clock, [load])
    assert load.totals() == {"seconds": 53.0, "busy_s": busy, "request_s": requests}


def answering(loads: list[Load]) -> Any:
    """The gateways' answers, which are copies."""
    return SimpleNamespace(
        loads=lambda: [
            {name: dict(value) if isinstance(value, dict) else value for name, value in load.totals().items()}
            for load in loads
        ]
    )


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("num_gateways", [1, 2])
def test_shares_are_those_of_the_time_since_the_last_look(seed, num_gateways):
    clock = Clock()
    loads = [Load(URLS, clock) for _ in range(num_gateways)]
    engine = EngineLoad(answering(loads))
    play(random.Random(seed + 100), clock, loads)
    assert engine.since_last() == {}
    busy, requests = play(random.Random(seed), clock, loads)
    shares = engine.since_last()
    assert shares["engine/in_flight"] == pytest.approx(sum(requests.values()) / 2 / 50)
    idle = 1 - sum(busy.values()) / 2 / 50
    if num_gateways == 1:
        assert shares["idle/engine"] == pytest.approx(idle)
    assert idle - 1e-9 <= shares["idle/engine"] <= 1


def test_of_several_gateways_the_busiest_says_how_idle_an_engine_was_at_most():
    clock = Clock()
    loads = [Load(["a"], clock) for _ in range(2)]
    engine = EngineLoad(answering(loads))
    engine.since_last()
    for load, seconds in zip(loads, (3.0, 1.0), strict=True):
        load.change("a", 2)
        clock.now += seconds
        load.change("a", -2)
    assert engine.since_last() == {"idle/engine": 0.25, "engine/in_flight": 2.0}


def test_an_engine_is_never_idle_for_less_than_no_time():
    """The gateways' clocks are read one after the other."""
    counted = [{"seconds": 1.0, "busy_s": {"a": busy}, "request_s": {"a": busy}} for busy in (0.0, 1.5)]
    counted[1]["seconds"] = 2.0
    engine = EngineLoad(SimpleNamespace(loads=lambda: [counted.pop(0)]))  # type: ignore[arg-type]
    engine.since_last()
    assert engine.since_last() == {"idle/engine": 0.0, "engine/in_flight": 1.5}


def test_a_gateway_that_was_started_again_or_is_silent_gives_no_shares():
    clock = Clock()
    loads = [Load(URLS, clock)]
    engine = EngineLoad(answering(loads))
    clock.now += 5
    engine.since_last()
    assert engine.since_last() == {}, "no time has gone by"
    loads[0] = Load(URLS, clock)
    clock.now += 1
    assert engine.since_last() == {}
    clock.now += 1
    assert engine.since_last() == {"idle/engine": 1.0, "engine/in_flight": 0.0}

    def silent() -> Any:
        raise ServiceError("gone")

    spoken, engine._admission = engine._admission, SimpleNamespace(loads=silent)  # type: ignore[assignment]
    assert engine.since_last() == {}
    engine._admission = spoken
    clock.now += 1
    assert engine.since_last() == {}, "nothing to compare with"
