"""The names of an environment's metrics, made and parsed: `<env>/<metric>` of training rollouts,
`eval_<env>/<metric>` of held-out ones.

They stand in metrics.jsonl and in the trackers beside TRL's own names, of which some have a slash as well
(`completions/mean_length`). An entry's environments are those that it counts the rollouts of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HELD_OUT = "eval_"
_COUNT = "rollouts"


def name_of(env: str, metric: str, held_out: bool = False) -> str:
    """The name under which metrics.jsonl and the trackers have a metric."""
    return f"{_HELD_OUT if held_out else ''}{env}/{metric}"


def as_held_out(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of rollouts that were held-out ones, under their names."""
    return {f"{_HELD_OUT}{name}": value for name, value in metrics.items()}


def by_env(entry: Mapping[str, Any], held_out: bool) -> dict[str, dict[str, float]]:
    """`{env: {metric: value}}` of an entry of the log, without what has no value."""
    prefix = _HELD_OUT if held_out else ""
    found: dict[str, dict[str, float]] = {}
    for name, value in entry.items():
        env, _, metric = name.removeprefix(prefix).rpartition("/")
        ours = name.startswith(prefix) and (held_out or not env.startswith(_HELD_OUT))
        if ours and value is not None and name_of(env, _COUNT, held_out) in entry:
            found.setdefault(env, {})[metric] = value
    return found


def of_each_env(entry: Mapping[str, Any], metric: str, held_out: bool) -> dict[str, float]:
    """`{env: value}` of one metric."""
    return {env: m[metric] for env, m in by_env(entry, held_out).items() if metric in m}


def before_and_after(
    before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, dict[str, list[float | None]]]:
    """`{env: {metric: [before, after]}}` of what the later of two evaluations measured."""
    earlier = by_env(before, held_out=True)
    return {
        env: {metric: [earlier.get(env, {}).get(metric), value] for metric, value in metrics.items()}
        for env, metrics in by_env(after, held_out=True).items()
    }
