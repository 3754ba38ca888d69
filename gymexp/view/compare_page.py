"""What the page that compares two runs, or two evaluations of one run, shows: no HTML or HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gymexp.config.redaction import without_secrets
from gymexp.statistics import holm, paired_change
from gymexp.view import tables
from gymexp.view.filters import BadAddress
from gymexp.view.pages import Arguments, Context
from gymexp.view.viewed_run import ViewedRun

_MOST = 60  # tasks that differ most
_NOT_COMPARED = ("output_dir", "resume", "name")


def compare_page(runs: Mapping[str, ViewedRun], run: ViewedRun, arguments: Arguments) -> Context:
    """A against B: by environment the paired change with its interval, and the tasks that differ most.

    The arguments: `with`, B's name, and `a` and `b`, the files of rollouts. Of one run alone, its first
    evaluation is compared with its newest.
    """
    other = runs.get(arguments.get("with") or run.slug)
    if other is None:
        raise BadAddress("with must be a run that the viewer shows")
    other.refresh()
    names = [tables.files_of(one.index) for one in (run, other)]
    files = [
        _file(names[0], arguments.get("a"), newest=run is not other),
        _file(names[1], arguments.get("b"), newest=True),
    ]
    sides = [_rewards(one, file) for one, file in zip((run, other), files, strict=True)]
    common = sides[0].keys() & sides[1].keys()
    changed = {key for key in common if run is not other and run.tasks.digest(key) != other.tasks.digest(key)}
    rows = _environments(sides, common - changed)
    differing = [
        {"key": key, "env": sides[0][key]["env"], "a": a, "b": b, "change": b["reward"] - a["reward"]}
        for key in common - changed
        if (a := sides[0][key])["reward"] is not None and (b := sides[1][key])["reward"] is not None
    ]
    differing = [row for row in differing if row["change"]]
    differing.sort(key=lambda row: (-abs(row["change"]), row["key"]))
    return {
        "other": other,
        "files": files,
        "names": names,
        "runs": runs,
        "envs": rows,
        "settings": _settings(run, other),
        "tasks": differing[:_MOST],
        "num_differing": len(differing),
        "num_changed": len(changed),
        "num_only": [len(side) - len(common) for side in sides],
    }


def _file(names: list[str], wanted: str | None, newest: bool) -> str | None:
    """Returns the file to compare: the wanted one, else the first or the newest evaluation, else a step."""
    if wanted:
        if wanted not in names:
            raise BadAddress(f"the run has no rollouts of {wanted}")
        return wanted
    evaluations = [name for name in names if name.startswith("eval-")] or names
    return evaluations[-1 if newest else 0] if evaluations else None


def _rewards(run: ViewedRun, file: str | None) -> dict[str, dict[str, Any]]:
    """Returns of each task of a file: env, mean reward, and its first rollout's number."""
    found = run.index.query(
        "SELECT key, env, AVG(reward) AS reward, MIN(number) AS number, COUNT(*) AS num, "
        "COUNT(reward) AS scored FROM rollouts WHERE file = ? GROUP BY key",
        (file,),
    )
    return {row["key"]: row for row in found}


def _environments(sides: list[dict[str, dict[str, Any]]], keys: set[str]) -> list[dict[str, Any]]:
    """Returns a row an environment: planned and scored rollouts, means, the paired change and its p."""
    rows = []
    for env in sorted({row["env"] for side in sides for row in side.values()}):
        rewards = [
            {
                k: r["reward"]
                for k, r in side.items()
                if k in keys and r["env"] == env and r["reward"] is not None
            }
            for side in sides
        ]
        of_env = [[row for row in side.values() if row["env"] == env] for side in sides]
        rows.append(
            {
                "env": env,
                "means": [tables.mean(row["reward"] for row in side) for side in of_env],
                "scored": [f"{sum(r['scored'] for r in s)}/{sum(r['num'] for r in s)}" for s in of_env],
                "change": paired_change(*rewards),
            }
        )
    compared = [row for row in rows if row["change"]]
    for row, p in zip(compared, holm([row["change"].p for row in compared]), strict=True):
        row["p"] = p
    return rows


def _settings(run: ViewedRun, other: ViewedRun) -> list[tuple[str, str, str]]:
    """Returns (key, A's value, B's value) of each key of the configurations that differs."""
    if run is other:
        return []
    left, right = (_flat(one.files.read_config()) for one in (run, other))
    keys = [key for key in {**left, **right} if key not in _NOT_COMPARED]
    differing = [(key, left.get(key, "–"), right.get(key, "–")) for key in keys]
    return [(k, a, b) for k, a, b in differing if a != b]


def _flat(value: Any, at: str = "") -> dict[str, str]:
    """Returns the values of nested dicts as texts, by their keys with dots, without secrets."""
    if isinstance(value, dict) and value:
        flat = [_flat(inner, f"{at}.{name}" if at else str(name)) for name, inner in value.items()]
        return {key: text for part in flat for key, text in part.items()}
    # The key's name decides whether the value is a secret.
    return {at: without_secrets(f"{at}: {value}").removeprefix(f"{at}: ")}
