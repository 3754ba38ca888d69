"""Compares runs that differ by one choice and by seed: rewards on held-out tasks, for docs/results."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from learning import Run, read_held_out, read_run

from gymexp.statistics import Change, paired_change

ByWay = Mapping[str, Sequence[Run]]


def read_ways(about: str, way_of: Callable[[Run], str], base: str, what_base_is: str) -> tuple[Path, ByWay]:
    """Reads the directory of the page and the runs from the command line. Writes a CSV file a run with the
    reward of each held-out task. Returns the directory and the runs of each way, those of `base` first."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    args = parser.parse_args()
    by_way: dict[str, list[Run]] = defaultdict(list)
    for directory in args.runs:
        run = read_run(directory)
        by_way[way_of(run)].append(run)
    if base not in by_way:
        parser.error(f"no RUN_DIR has {what_base_is}")
    args.target.mkdir(parents=True, exist_ok=True)
    for way, runs in by_way.items():
        for run in runs:
            rows = (f"{task},{before:.6g},{after:.6g}" for task, (before, after) in rewards_of(run).items())
            (args.target / f"{way}_{run.seed}.csv").write_text("task,before,after\n" + "\n".join(rows) + "\n")
    others = sorted(by_way.keys() - {base})
    return args.target, {way: sorted(by_way[way], key=lambda run: run.seed) for way in (base, *others)}


def rewards_of(run: Run) -> dict[str, tuple[float, float]]:
    """Returns the rewards before and after training, of the held-out tasks that have both."""
    found = {}
    for task, (before, after) in sorted(read_held_out(run).items()):
        if before is not None and after is not None:
            found[task] = (before, after)
    return found


def reward_tables(by_way: ByWay, base: str) -> list[str]:
    """Returns a table for each environment: the change of the reward, of each seed too, and the difference
    after training from `base`, paired over the tasks."""
    lines = [
        "Rewards on held-out tasks. ± is the 95 % interval over tasks, with the mean over seeds of each.",
        "",
    ]
    for env in by_way[base][0].config["env"]:
        lines += [f"## {env}", "", f"| run | change of the reward | of each seed | difference from {base} |"]
        lines += ["|---|---|---|---|"]
        of_base = _means(by_way[base], env, 1)
        for way, runs in by_way.items():
            seeds = ", ".join(f"{_change_of([run], env).mean:+.3f}" for run in runs)
            other = paired_change(of_base, _means(runs, env, 1)) if way != base else None
            lines.append(f"| {way} | {_shown(_change_of(runs, env))} | {seeds} | {_shown(other)} |")
        lines.append("")
    return lines


def _means(runs: Sequence[Run], env: str, column: int) -> dict[str, float]:
    """Returns the mean over the runs of each task's reward. column: 0 before training, 1 after."""
    of_runs = [rewards_of(run) for run in runs]
    common = set.intersection(*(set(rewards) for rewards in of_runs))
    tasks = sorted(task for task in common if task.startswith(f"{env}/"))
    return {task: statistics.mean(rewards[task][column] for rewards in of_runs) for task in tasks}


def _change_of(runs: Sequence[Run], env: str) -> Change:
    change = paired_change(_means(runs, env, 0), _means(runs, env, 1))
    assert change, "a run has many held-out tasks"
    return change


def _shown(change: Change | None) -> str:
    return f"{change.mean:+.3f} ± {(change.high - change.low) / 2:.3f}" if change else ""
