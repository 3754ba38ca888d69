"""The tables of the viewer's pages: steps, groups of a step, and tasks, from a run's rows. No HTML."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median, pstdev
from typing import Any

from gymexp.view.run_index import RunIndex

Row = dict[str, Any]
KINDS = ("mixed", "all solved", "none solved", "failed")


def kind_of(rollouts: Sequence[Mapping[str, Any]]) -> str:
    """Returns the kind of a group, as training/metrics.py counts it.

    mixed: its rewards differ. all solved, none solved: they are equal. failed: fewer than two have a reward.
    """
    rewards = [r["reward"] for r in rollouts if r["reward"] is not None]
    if len(rewards) < 2:
        return "failed"
    if len(set(rewards)) > 1:
        return "mixed"
    solved = next(r["success"] for r in rollouts if r["reward"] is not None)
    return "all solved" if solved else "none solved"


def mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of the values that there are; None without one."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def files_of(index: RunIndex) -> list[str]:
    """Returns the names of the files of rollouts: training steps in order, and each evaluation after the step
    that it was played after."""
    rows = index.query("SELECT file FROM rollouts GROUP BY file ORDER BY step, split DESC")
    return [row["file"] for row in rows]


def environments(index: RunIndex) -> list[str]:
    """Returns the environments of the rows, sorted."""
    return [row["env"] for row in index.query("SELECT DISTINCT env FROM rollouts ORDER BY env")]


def step_rows(index: RunIndex, metrics: Mapping[int, Mapping[str, Any]]) -> list[Row]:
    """Returns a row a file of rollouts: rewards by environment, groups by kind, failed, seconds.

    metrics: the entry of metrics.jsonl of each training step.
    """
    by_file: dict[str, Row] = {}
    for found in index.query(
        "SELECT file, step, split, env, COUNT(*) AS num, AVG(reward) AS reward, "
        "SUM(outcome = 'failed') AS failed, SUM(outcome = 'truncated') AS truncated, SUM(tokens) AS tokens, "
        "MIN(began) AS began, MAX(began + total_s) AS ended FROM rollouts GROUP BY file, env"
    ):
        row = by_file.setdefault(
            found["file"],
            {name: found[name] for name in ("file", "step", "split")}
            | {"rewards": {}, "num": 0, "failed": 0, "truncated": 0, "tokens": 0, "began": [], "ended": []},
        )
        row["rewards"][found["env"]] = found["reward"]
        for name in ("num", "failed", "truncated", "tokens"):
            row[name] += found[name] or 0
        for name in ("began", "ended"):
            row[name] += [found[name]] if found[name] else []
    for row in by_file.values():
        row["kinds"] = dict.fromkeys(KINDS, 0)
        row["rollout_s"] = max(row["ended"]) - min(row["began"]) if row["began"] and row["ended"] else None
        entry = metrics.get(row["step"], {}) if row["split"] == "train" else {}
        row["step_s"] = entry.get("time/step")
    for file, kind, num in _kinds(index):
        by_file[file]["kinds"][kind] = num
    return sorted(by_file.values(), key=lambda row: (row["step"], row["split"] == "train"))


def _kinds(index: RunIndex) -> Iterable[tuple[str, str, int]]:
    found = index.query(
        "SELECT file, kind, COUNT(*) AS num FROM (SELECT file, CASE WHEN COUNT(reward) < 2 THEN 'failed' "
        "WHEN MIN(reward) < MAX(reward) THEN 'mixed' WHEN MAX(success) THEN 'all solved' "
        "ELSE 'none solved' END AS kind FROM rollouts GROUP BY file, grp) GROUP BY file, kind"
    )
    return ((row["file"], row["kind"], row["num"]) for row in found)


def group_rows(index: RunIndex, file: str, env: str = "") -> list[Row]:
    """Returns a row a group of a file, in order, each with its rollouts and the task's visit before it."""
    rollouts = index.query(
        "SELECT * FROM rollouts WHERE file = ? AND (? = '' OR env = ?) ORDER BY grp, number", (file, env, env)
    )
    groups: dict[int, list[Row]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout["grp"]].append(rollout)
    last_seen = _last_seen(index, rollouts)
    return [_group(number, of_group, last_seen) for number, of_group in groups.items()]


def _group(number: int, rollouts: list[Row], last_seen: Mapping[str, Row]) -> Row:
    seconds = [r["total_s"] for r in rollouts if r["total_s"] is not None]
    tokens = [r["tokens"] for r in rollouts if r["tokens"] is not None]
    key = rollouts[0]["key"]
    advantages = [r["advantage"] for r in rollouts if r["advantage"] is not None]
    said = Counter(r["text"] for r in rollouts if r["text"]).most_common()
    reward, seen = mean(r["reward"] for r in rollouts), last_seen.get(key)
    change = reward - seen["reward"] if seen and reward is not None and seen["reward"] is not None else None
    return {
        "group": number,
        "key": key,
        "env": rollouts[0]["env"],
        "file": rollouts[0]["file"],
        "rollouts": rollouts,
        "mean": reward,
        "kind": kind_of(rollouts),
        "spread": pstdev(advantages) if advantages else None,
        "said": said[:1],
        "distinct": len(said) or None,
        "tokens": (median(tokens), max(tokens)) if tokens else None,
        "seconds": (median(seconds), max(seconds)) if seconds else None,
        "seen": seen,
        "change": change,
    }


def _last_seen(index: RunIndex, rollouts: Sequence[Row]) -> dict[str, Row]:
    """Returns of each task the newest earlier file of the same split, with its mean reward there, the number
    of visits until then, and how many of their rollouts were solved."""
    if not rollouts:
        return {}
    found = index.query(
        "SELECT key, file, step, AVG(reward) AS reward, COUNT(*) OVER w AS visits, "
        "SUM(SUM(success)) OVER w AS solved FROM rollouts "
        "WHERE split = :split AND step < :step AND key IN (SELECT key FROM rollouts WHERE file = :file) "
        "GROUP BY key, file WINDOW w AS (PARTITION BY key) ORDER BY step",
        {name: rollouts[0][name] for name in ("split", "step", "file")},
    )
    return {row["key"]: row for row in found}


def task_rows(index: RunIndex, split: str, env: str) -> list[Row]:
    """Returns a row a task: how often it was solved, its visits as `history`, its best reward."""
    visits: dict[str, list[Row]] = defaultdict(list)
    for row in index.query(
        "SELECT key, env, file, step, MIN(grp) AS grp, AVG(reward) AS reward, MAX(reward) AS best, "
        "SUM(success) AS solved, COUNT(reward) AS scored, COUNT(*) AS num FROM rollouts "
        "WHERE split = ? AND (? = '' OR env = ?) GROUP BY key, file ORDER BY key, step",
        (split, env, env),
    ):
        visits[row["key"]].append(row)
    return [_task(key, of_task) for key, of_task in visits.items()]


def _task(key: str, visits: list[Row]) -> Row:
    solved, scored = (sum(v[name] or 0 for v in visits) for name in ("solved", "scored"))
    best = [v["best"] for v in visits if v["best"] is not None]
    rewards = [v["reward"] for v in visits if v["reward"] is not None]
    return {
        "key": key,
        "env": visits[0]["env"],
        "solved": solved,
        "scored": scored,
        "rollouts": sum(v["num"] for v in visits),
        "kind": "never" if not solved else "always" if solved == scored else "sometimes",
        "visits": len(visits),
        "best": max(best, default=None),
        "first": rewards[0] if rewards else None,
        "last": rewards[-1] if rewards else None,
        "change": rewards[-1] - rewards[0] if len(rewards) > 1 else None,
        "history": visits,
    }


def sorted_rows(rows: list[Row], column: str, direction: str) -> list[Row]:
    """Returns rows sorted by a value; those without one come last."""

    def value(row: Row) -> Any:
        found = row[column]
        return found[0] if isinstance(found, tuple) else found

    known = [row for row in rows if value(row) is not None]
    known.sort(key=value, reverse=direction == "DESC")
    return known + [row for row in rows if value(row) is None]
