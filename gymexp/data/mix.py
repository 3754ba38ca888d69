"""One training order out of several environments' tasks: shares by weight, the same every time. Pure."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any

from gymexp.errors import DataError
from gymexp.rollout.outcome import Task


def mix(
    tasks_by_env: Mapping[str, Sequence[Task]],
    weights: Mapping[str, float],
    size: int | None,
    order: str,
    seed: int,
) -> list[Task]:
    """`size` tasks, of which each environment has its weight's share, to within one task.

    size: None takes as many as the weights allow without repeating a task. Where an environment's share is
    more than it has, its tasks come again in whole epochs, each shuffled anew. An environment of weight 0 is
    left out. order: "shuffle", or "interleave": it keeps each environment's count in the first k tasks, for
    any k, within one of k times its share. So in any window of consecutive tasks it is within two of its
    share, and within one if there are two environments. (Three or more can have shares for which no order
    keeps every window within one.) The result depends on the arguments alone, and an environment's own order
    stays as others come and go.
    """
    counts = share_out({env: len(tasks) for env, tasks in tasks_by_env.items()}, weights, size)
    queues = {env: _epochs(env, tasks_by_env[env], seed) for env in counts}
    if order == "interleave":
        return [next(queues[env]) for env in _interleaved(counts)]
    assert order == "shuffle", order
    mixed = [next(queues[env]) for env, count in counts.items() for _ in range(count)]
    random.Random(f"{seed}/shuffle").shuffle(mixed)
    return mixed


def epoch_order(mixed: Sequence[Task], epoch: int, order: str, seed: int) -> list[int]:
    """Which task of `mixed` comes when in an epoch of training, as indices; epoch 0 is `mixed` as it is.

    A later epoch has the same tasks in another order, which the arguments alone decide. order "interleave"
    leaves each environment its places, so that what `mix` promises of the first k tasks, and of any window,
    holds over any number of epochs; in its places an environment's tasks come in another order. Of a mix that
    has tasks several times, each comes once before one comes again.
    """
    if epoch == 0:
        return list(range(len(mixed)))
    if order == "shuffle":
        shuffled = list(range(len(mixed)))
        random.Random(f"{seed}/shuffle/{epoch}").shuffle(shuffled)
        return shuffled
    assert order == "interleave", order
    rounds: dict[str, list[list[int]]] = {}
    times: Counter[str] = Counter()
    for index, task in enumerate(mixed):
        of_env = rounds.setdefault(task.env, [])
        if times[task.key] == len(of_env):
            of_env.append([])
        of_env[times[task.key]].append(index)
        times[task.key] += 1
    for env, of_env in rounds.items():
        draws = random.Random(f"{seed}/{env}/again/{epoch}")
        for one in of_env:
            draws.shuffle(one)
    queues = {env: chain.from_iterable(of_env) for env, of_env in rounds.items()}
    return [next(queues[task.env]) for task in mixed]


def share_out(available: Mapping[str, int], weights: Mapping[str, float], size: int | None) -> dict[str, int]:
    """How many tasks each environment of weight > 0 gives, alphabetically; largest remainders round up."""
    # Through str, 0.1 is a tenth: weights 0.1 and 0.3 are exactly one to three.
    exact = {env: Fraction(str(weights[env])) for env in sorted(available) if weights[env] > 0}
    if not exact:
        raise DataError("env.<name>.weight must be > 0 for at least one environment, got 0 for all")
    for env in exact:
        if not available[env]:
            raise DataError(
                f"env.{env} has weight {weights[env]:g} but no training tasks: give it some, or weight=0"
            )
    total = sum(exact.values())
    if size is None:
        size = min(math.floor(available[env] * total / weight) for env, weight in exact.items())
    ideal = {env: weight / total * size for env, weight in exact.items()}
    counts = {env: math.floor(share) for env, share in ideal.items()}
    missing = size - sum(counts.values())
    for env in sorted(counts, key=lambda env: (counts[env] - ideal[env], env))[:missing]:
        counts[env] += 1
    return counts


def _epochs(env: str, tasks: Sequence[Task], seed: int) -> Iterator[Task]:
    """The tasks without end: shuffled, then shuffled again, and so on."""
    epoch = 0
    while True:
        shuffled = list(tasks)
        random.Random(f"{seed}/{env}/{epoch}").shuffle(shuffled)
        yield from shuffled
        epoch += 1


def _interleaved(counts: Mapping[str, int]) -> Iterator[str]:
    """Environment names, each as often as `counts` says, as evenly as can be.

    Of the environments that have fallen behind their share far enough, the one whose next task is due first
    comes next. Source: Tijdeman, "The chairman assignment problem" (1980), which proves that every count then
    stays within 1 - 1/(2n - 2) of its share at every position, n being the number of environments.
    """
    counts = {env: count for env, count in counts.items() if count}
    total = sum(counts.values())
    slack = Fraction(1, max(2 * len(counts) - 2, 1))
    used = dict.fromkeys(counts, 0)

    def span(env: str) -> tuple[Fraction, Fraction]:
        """From which position on the environment's next task may come, and by which it must."""
        return (used[env] + slack) * total / counts[env], (used[env] + 1 - slack) * total / counts[env]

    spans = {env: span(env) for env in counts}
    for position in range(1, total + 1):
        env = min((env for env in counts if spans[env][0] <= position), key=lambda env: spans[env][1])
        used[env] += 1
        spans[env] = span(env)
        yield env


def describe(
    mixed: Sequence[Task],
    tasks_by_env: Mapping[str, Sequence[Task]],
    weights: Mapping[str, float],
    order: str,
    seed: int,
) -> dict[str, Any]:
    """What `data/mix.json` says of a mix, which is one epoch of training.

    in_epoch: tasks of the environment in it. repeats: how many of these had come before.
    """
    counts = Counter(task.env for task in mixed)
    return {
        "order": order,
        "seed": seed,
        "size": len(mixed),
        "sha256": keys_sha256(mixed),
        "envs": {
            env: {
                "weight": weights[env],
                "available": len(tasks),
                "in_epoch": counts[env],
                "repeats": max(0, counts[env] - len(tasks)),
                "share": counts[env] / len(mixed),
            }
            for env, tasks in tasks_by_env.items()
        },
    }


def keys_sha256(tasks: Sequence[Task]) -> str:
    """A fingerprint of which tasks come in which order."""
    return hashlib.sha256("\n".join(task.key for task in tasks).encode()).hexdigest()
