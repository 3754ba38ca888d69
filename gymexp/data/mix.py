"""One training order of several environments' tasks, by weight and reproducible. Pure functions."""

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
    """Returns `size` tasks in training order; each environment has its weight's share, to within one task.

    size: None takes as many tasks as the weights allow without repeating one. An environment whose share is
    larger than its number of tasks repeats them in whole epochs, each shuffled anew. An environment of weight
    0 is left out. order: "shuffle" or "interleave". "interleave" keeps each environment's count in the first
    k tasks, for any k, within one of k times its share. So its count in any window of consecutive tasks is
    within two of its share, and within one if the mix has two environments. (For three or more environments,
    some shares allow no order that keeps every window within one.) The result depends on the arguments alone.
    The order of one environment's tasks does not change when other environments are added or removed.
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
    """Returns the order of an epoch's tasks, as indices into `mixed`; epoch 0 is `mixed` itself.

    A later epoch has the same tasks in another order, which depends on the arguments alone. With order
    "interleave" each environment keeps its places, and only its own tasks change order within them. So what
    `mix` promises of the first k tasks, and of any window, holds over any number of epochs. If `mixed`
    repeats an environment's tasks, each of them comes once before one comes again.
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
        for indices in of_env:
            draws.shuffle(indices)
    queues = {env: chain.from_iterable(of_env) for env, of_env in rounds.items()}
    return [next(queues[task.env]) for task in mixed]


def share_out(available: Mapping[str, int], weights: Mapping[str, float], size: int | None) -> dict[str, int]:
    """Returns the number of tasks of each environment of weight > 0, by name in alphabetical order.

    size: as in `mix`. The environments with the largest remainders get the tasks that rounding down leaves
    over. Raises DataError if all weights are 0, or if an environment of weight > 0 has no tasks.
    """
    # Fraction(str(0.1)) is exactly 1/10, so weights 0.1 and 0.3 are exactly one to three.
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
    """Yields the tasks epoch after epoch without end, each epoch shuffled anew."""
    epoch = 0
    while True:
        shuffled = list(tasks)
        random.Random(f"{seed}/{env}/{epoch}").shuffle(shuffled)
        yield from shuffled
        epoch += 1


def _interleaved(counts: Mapping[str, int]) -> Iterator[str]:
    """Yields environment names as evenly as possible, each as many times as `counts` says.

    Candidates for a position are the environments that are far enough behind their share; the candidate whose
    next task is due first is taken. Source: Tijdeman, "The chairman assignment problem" (1980), which proves
    that every count then stays within 1 - 1/(2n - 2) of its share at every position, for n environments.
    """
    counts = {env: count for env, count in counts.items() if count}
    total = sum(counts.values())
    slack = Fraction(1, max(2 * len(counts) - 2, 1))
    used = dict.fromkeys(counts, 0)

    def span(env: str) -> tuple[Fraction, Fraction]:
        """Returns the first position that the environment's next task may take, and the last one."""
        return (used[env] + slack) * total / counts[env], (used[env] + 1 - slack) * total / counts[env]

    spans = {env: span(env) for env in counts}
    for position in range(1, total + 1):
        env = min((env for env in counts if spans[env][0] <= position), key=lambda env: spans[env][1])
        used[env] += 1
        spans[env] = span(env)
        yield env


def pool(tasks_by_env: Mapping[str, Sequence[Task]], envs: Sequence[str]) -> list[Task]:
    """Returns each task of `envs` once, one environment after the other: the tasks that a curriculum draws
    from. Raises DataError if one of these environments has no tasks."""
    for env in envs:
        if not tasks_by_env[env]:
            raise DataError(f"env.{env} has a weight but no training tasks: give it some, or weight 0")
    return [task for env in envs for task in tasks_by_env[env]]


def describe(
    mixed: Sequence[Task],
    tasks_by_env: Mapping[str, Sequence[Task]],
    weights: Mapping[str, float],
    order: str,
    seed: int,
) -> dict[str, Any]:
    """Returns the content of `data/mix.json`, which describes a mix; a mix is one epoch of training.

    in_epoch: number of the environment's tasks in the epoch. repeats: how many of these are repetitions.
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
    """Returns a fingerprint of the tasks and their order."""
    return hashlib.sha256("\n".join(task.key for task in tasks).encode()).hexdigest()
