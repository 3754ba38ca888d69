"""The rules of `dataset.schedule`, `dataset.sampling` and `env.<name>.replicas`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gymexp.config.schema import EnvConfig, RunConfig
from gymexp.config.suggestions import nearest

SAMPLINGS = ("uniform", "difficulty")


def problems_of_mix(config: RunConfig) -> Iterator[str]:
    """Yields a line for each rule that the keys of the mix break, with key, rule, value and fix."""
    dataset = config.dataset
    if dataset.sampling not in SAMPLINGS:
        near = nearest(str(dataset.sampling), SAMPLINGS)
        yield f"dataset.sampling must be one of {', '.join(SAMPLINGS)}, got {dataset.sampling!r}{near}"
    yield from _problems_of_schedule(dataset.schedule, config.env)
    key = "schedule" if dataset.schedule else "sampling=difficulty"
    if not dataset.schedule and dataset.sampling != "difficulty":
        return
    if dataset.train_size is not None:
        yield (
            f"dataset.train_size must be left out with dataset.{key}, which chooses the tasks of each batch, "
            f"got {dataset.train_size!r}: env.<name>.data.train_size limits the tasks of an environment"
        )
    if dataset.order != "interleave":
        yield f"dataset.order must be interleave with dataset.{key}, got {dataset.order!r}: leave it out"


def problems_of_replicas(at: str, replicas: Any, runtime: str) -> Iterator[str]:
    """Yields a line if the replicas of an environment break a rule. at: its key."""
    if replicas == "auto":
        if runtime != "managed":
            yield (
                f"{at}.replicas must be a number with gym.runtime={runtime}, whose servers gymexp does not "
                "start, got 'auto'"
            )
    elif isinstance(replicas, bool) or not isinstance(replicas, int):
        yield f"{at}.replicas must be a whole number or auto, got {replicas!r}"
    elif replicas < 1:
        yield f"{at}.replicas must be >= 1, got {replicas!r}"


def _problems_of_schedule(schedule: Mapping[Any, Any], envs: Mapping[str, EnvConfig]) -> Iterator[str]:
    for step, weights in schedule.items():
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            yield (
                f"dataset.schedule must have numbers of steps >= 0 as its keys, got {step!r}: write e.g. "
                "'dataset.schedule={0:{sudoku:1,workplace:0},100:{sudoku:1,workplace:1}}'"
            )
        elif not isinstance(weights, Mapping) or not weights:
            yield f"dataset.schedule.{step} must have a weight for each environment, got {weights!r}"
        else:
            yield from _problems_of_point(step, weights, envs)
    points = [set(weights) for weights in schedule.values() if isinstance(weights, Mapping)]
    named = set().union(*points)
    if any(point != named for point in points):
        yield (
            "dataset.schedule must name the same environments at every step, got "
            + "; ".join(f"{step}: {', '.join(map(str, weights))}" for step, weights in schedule.items())
            + ": add the missing ones, with 0 for none"
        )
    for name in sorted(named & set(envs)):
        if envs[name].weight != EnvConfig.weight:
            yield (
                f"env.{name}.weight must be left out where dataset.schedule has weights of {name}, got "
                f"{envs[name].weight!r}"
            )


def _problems_of_point(step: int, weights: Mapping[Any, Any], envs: Mapping[str, EnvConfig]) -> Iterator[str]:
    at = f"dataset.schedule.{step}"
    for name, weight in weights.items():
        if name not in envs:
            near = nearest(str(name), list(envs))
            known = ", ".join(envs)
            yield f"{at}.{name} must be of a selected environment ({known}){near}: add it to env=[…]"
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
            yield f"{at}.{name} must be a number >= 0, got {weight!r}"
            return
    if not any(weights.get(name, env.weight) for name, env in envs.items()):
        yield f"{at} must have a weight > 0 for at least one environment, got 0 for all: {', '.join(envs)}"
