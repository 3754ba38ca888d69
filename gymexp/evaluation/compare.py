"""Compares evaluations and runs whose rollouts exist already, paired by task. Plays nothing.

A policy of an evaluation, or a run's last held-out evaluation, is a side. Every later side is compared with
the first, on the tasks whose rows are the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from gymexp.data.prepare import load_prepared
from gymexp.errors import ConfigError, RunDirectoryError
from gymexp.evaluation.plan import TASKS, Plan, task_hashes, tasks_of
from gymexp.evaluation.results import env_of
from gymexp.evaluation.results_table import aligned
from gymexp.files import read_json
from gymexp.record.directory import PLAN
from gymexp.record.own_files import check_own
from gymexp.rollout.rollout_files import read_index
from gymexp.statistics import Change, holm, paired_change

_NOTE = (
    "The change is paired by task: its 95 % interval is Student's t over the tasks, p is by sign flips\n"
    "and adjusted for the number of rows (Holm). detectable: the smallest change that so many such tasks\n"
    "find four times of five. They say nothing of other training seeds."
)


@dataclass(frozen=True)
class Side:
    """What a policy scored. rewards: the mean over its scored samples, by task. hashes: of the tasks'
    rows."""

    label: str
    rewards: dict[str, float]
    hashes: dict[str, str]


@dataclass(frozen=True)
class Pair:
    """An environment in two sides. change: None with fewer than two common tasks. refused: tasks that both
    have scored under one key but with different rows. alone: tasks that one side alone has scored."""

    env: str
    label: str
    first: float | None
    second: float | None
    change: Change | None
    refused: int
    alone: int


def compare(directories: Sequence[str]) -> str:
    """Returns the table of a comparison. Raises ConfigError if there is nothing to compare."""
    sides = [side for directory in directories for side in read_sides(Path(directory).expanduser())]
    if len(sides) < 2:
        raise ConfigError(
            "compare must name two evaluations or runs, or one evaluation of several policies, got "
            f"{', '.join(directories)}"
        )
    first, *others = sides
    pairs = [pair for other in others for pair in pairs_of(first, other)]
    if not any(pair.change for pair in pairs):
        refused = sum(pair.refused for pair in pairs)
        raise ConfigError(
            f"compare must name evaluations of the same tasks, but {first.label} has fewer than two in "
            f"common with each of the others ({refused} tasks have the same key and other rows)"
        )
    return comparison_table(first.label, pairs)


def read_sides(directory: Path) -> list[Side]:
    """Returns the sides in a directory: each policy of an evaluation, or a run's last held-out evaluation.

    Raises RunDirectoryError if it has no rollouts of an evaluation.
    """
    if not directory.is_dir():
        raise RunDirectoryError(f"compare must name directories that exist, got {directory}")
    check_own(directory)
    rewards: dict[str, dict[str, list[float]]] = {}
    for row in read_index(directory / "rollouts"):
        if row["file"].startswith("eval-"):
            of_file = rewards.setdefault(row["file"], {})
            if row.get("reward") is not None:
                of_file.setdefault(row["key"], []).append(row["reward"])
    means = {file: {key: fmean(values) for key, values in of.items()} for file, of in rewards.items()}
    if not means:
        raise RunDirectoryError(
            f"compare must name directories of finished evaluations, or of runs with held-out rollouts and "
            f"an index of them, but {directory} has none"
        )
    if (directory / PLAN).exists():
        hashes = {key: str(value) for key, value in read_json(directory / TASKS).items()}
        policies = Plan.read(directory).policies
        alone = len(policies) == 1
        return [
            Side(
                _label(directory) if alone else f"{_label(directory)} {policy.label}",
                means[policy.file],
                hashes,
            )
            for policy in policies
            if policy.file in means
        ]
    last = max(means)
    hashes = task_hashes(tasks_of(load_prepared(directory / "data")))
    return [Side(f"{_label(directory)} {last}", means[last], hashes)]


def _label(directory: Path) -> str:
    """Returns a short name: the last two parts of outputs/…/<name>/<date_time>."""
    return "/".join(directory.resolve().parts[-2:])


def pairs_of(first: Side, second: Side) -> list[Pair]:
    """Returns the comparison of each environment that either side has. Pure."""
    pairs = []
    for env in sorted({env_of(key) for key in (*first.rewards, *second.rewards)}):
        ours, theirs = _of_env(first.rewards, env), _of_env(second.rewards, env)
        common = ours.keys() & theirs.keys()
        same = {key for key in common if first.hashes.get(key) == second.hashes.get(key) is not None}
        before = {key: ours[key] for key in same}
        after = {key: theirs[key] for key in same}
        pairs.append(
            Pair(
                env,
                second.label,
                fmean(before.values()) if same else None,
                fmean(after.values()) if same else None,
                paired_change(before, after),
                len(common) - len(same),
                len(ours.keys() ^ theirs.keys()),
            )
        )
    return pairs


def _of_env(rewards: Mapping[str, float], env: str) -> dict[str, float]:
    return {key: reward for key, reward in rewards.items() if env_of(key) == env}


def comparison_table(first: str, pairs: Sequence[Pair]) -> str:
    """Returns the pairs as a table. first: the label of the side that the others are compared with. Pure."""
    changes = [pair.change for pair in pairs if pair.change]
    adjusted = iter(holm([change.p for change in changes]))
    head = [
        "compared with",
        "environment",
        "tasks",
        "first",
        "second",
        "change",
        "95 % CI",
        "p",
        "detectable",
    ]
    rows = [[*head, "better/same/worse"]]
    notes = []
    for pair in pairs:
        row = [pair.label, pair.env]
        if pair.change is None:
            rows.append([*row, "0", *["–"] * (len(rows[0]) - 3)])
        else:
            change, p = pair.change, next(adjusted)
            is_equal = change.low == change.high
            rows.append(
                [
                    *row,
                    str(change.num_tasks),
                    f"{pair.first:.3f}",
                    f"{pair.second:.3f}",
                    f"{change.mean:+.3f}",
                    "all equal" if is_equal else f"[{change.low:+.3f}, {change.high:+.3f}]",
                    "<0.001" if p < 0.001 else f"{p:.3f}",
                    "–" if is_equal else f"{change.detectable:.3f}",
                    f"{change.better}/{change.same}/{change.worse}",
                ]
            )
        if pair.refused:
            notes.append(f"{pair.label}, {pair.env}: {pair.refused} tasks left out, whose rows differ")
        if pair.alone:
            notes.append(
                f"{pair.label}, {pair.env}: {pair.alone} tasks left out, which one side alone has scored"
            )
    return "\n".join([f"first: {first}", aligned(rows), *notes, _NOTE])
