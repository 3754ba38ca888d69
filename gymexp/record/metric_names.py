"""Makes and parses the names of an environment's metrics.

A metric of training rollouts is `<env>/<metric>`, and one of held-out rollouts is `eval_<env>/<metric>`.
metrics.jsonl and the trackers also contain TRL's own names, and some of these have a slash as well
(`completions/mean_length`). So a prefix counts as an environment only if the entry has `<prefix>/rollouts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HELD_OUT = "eval_"
_COUNT = "rollouts"


def name_of(env: str, metric: str, held_out: bool = False) -> str:
    """Returns the name of an environment's metric in metrics.jsonl and the trackers."""
    return f"{_HELD_OUT if held_out else ''}{env}/{metric}"


def as_held_out(metrics: Mapping[str, float]) -> dict[str, float]:
    """Renames metrics `<env>/<metric>` of held-out rollouts to `eval_<env>/<metric>`."""
    return {f"{_HELD_OUT}{name}": value for name, value in metrics.items()}


def by_env(entry: Mapping[str, Any], held_out: bool) -> dict[str, dict[str, float]]:
    """Returns `{env: {metric: value}}` of an entry of metrics.jsonl, without metrics that are null."""
    prefix = _HELD_OUT if held_out else ""
    metrics: dict[str, dict[str, float]] = {}
    for name, value in entry.items():
        env, _, metric = name.removeprefix(prefix).rpartition("/")
        is_kind = name.startswith(prefix) and (held_out or not env.startswith(_HELD_OUT))
        if is_kind and value is not None and name_of(env, _COUNT, held_out) in entry:
            metrics.setdefault(env, {})[metric] = value
    return metrics


def of_each_env(entry: Mapping[str, Any], metric: str, held_out: bool) -> dict[str, float]:
    """Returns `{env: value}` of one metric in an entry of metrics.jsonl."""
    return {env: m[metric] for env, m in by_env(entry, held_out).items() if metric in m}


def before_and_after(
    before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, dict[str, list[float | None]]]:
    """Returns `{env: {metric: [before, after]}}` for the metrics of the later of two evaluations."""
    earlier = by_env(before, held_out=True)
    return {
        env: {metric: [earlier.get(env, {}).get(metric), value] for metric, value in metrics.items()}
        for env, metrics in by_env(after, held_out=True).items()
    }
