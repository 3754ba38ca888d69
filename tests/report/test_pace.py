"""The load exponent against simulated engines, and the estimated step against a simulated schedule."""

from __future__ import annotations

import math
import random

import pytest

from gymexp.report.pace import load_exponent, step_with_lead

TOKEN_S = 0.01


def played(exponent: float, spread: float = 0.8, count: int = 48, idle: float = 0.0) -> list[dict]:
    """Rollouts that an engine samples together, in small steps of time: a token takes TOKEN_S times the load
    to the power of the exponent. spread: of the logarithm of their lengths. idle: the share of a rollout's
    time that its environment takes."""
    rng = random.Random(3)
    left = [400 * math.exp(rng.gauss(0, spread)) for _ in range(count)]
    tokens, ends, time = [round(one) for one in left], [0.0] * count, 0.0
    while running := [i for i in range(count) if left[i] > 0]:
        rate = (1 - idle) / (TOKEN_S * (len(running) * (1 - idle)) ** exponent)
        time += 0.05
        for i in running:
            left[i] -= 0.05 * rate
            ends[i] = time
    return [
        {"env": "e", "began": 100.0, "tokens": n, "seconds": {"total": end, "policy": end * (1 - idle)}}
        for n, end in zip(tokens, ends, strict=True)
    ]


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("idle", [0.0, 0.5])
def test_an_engines_exponent_is_found_from_its_rollouts(exponent, idle):
    assert load_exponent(played(exponent, idle=idle)) == pytest.approx(exponent, abs=0.12)


def test_it_is_unknown_where_all_loads_are_equal_or_nothing_was_timed():
    assert load_exponent(played(1.0, spread=0.0)) is None
    assert load_exponent(played(1.0, count=10)) is None
    untimed: tuple[dict, ...] = (
        {},
        {"policy": 1.0},
        {"policy": 1.0, "total": 0.0},
        {"policy": -1.0, "total": 2.0},
    )
    assert (
        load_exponent([{"env": "e", "began": 1.0, "tokens": 3, "seconds": one} for one in untimed * 20])
        is None
    )


def simulated(batch_s: float, trainer_s: float, lead: int, exponent: float) -> float:
    """The mean seconds of a step, from a simulation in small steps of time: at each update the batch `lead`
    later begins; each batch's work goes on at the load of all batches in flight."""
    tick, work = 0.01, {n: batch_s for n in range(lead + 1)}
    time, step, training = 0.0, 0, 0.0
    marks = []
    while step < 60:
        running = [n for n, left in work.items() if left > 0]
        for n in running:
            work[n] -= tick / len(running) ** exponent
        time += tick
        if training > 0:
            training -= tick
            if training <= 0:
                step += 1
                work[step + lead] = batch_s
                marks.append(time)
        elif work[step] <= 0:
            training = trainer_s
    return (marks[-1] - marks[19]) / (len(marks) - 20)


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("batch_s", "trainer_s"), [(12.0, 3.0), (4.0, 4.0), (2.0, 6.0)])
@pytest.mark.parametrize("lead", [1, 3])
def test_the_estimate_is_that_of_a_simulated_schedule(batch_s, trainer_s, lead, exponent):
    expected = simulated(batch_s, trainer_s, lead, exponent)
    assert step_with_lead(batch_s, trainer_s, lead, exponent) == pytest.approx(expected, rel=0.1)
