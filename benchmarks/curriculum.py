"""Compares curricula with a flat mix: makes the files of docs/results/curriculum from the runs of a sweep.

    python -m gymexp.train --config-dir sweeps --config-name curriculum experiment=quickstart
    python benchmarks/curriculum.py docs/results/curriculum outputs/quickstart/sweep_<date_time>/*/

The runs differ by dataset.schedule, dataset.sampling and seed. summary.md has the reward on held-out tasks
before and after training, and how each curriculum differs from the flat mix, paired over the tasks. A CSV
file a run has the reward of each held-out task.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from learning import Run, read_held_out, read_run

from gymexp.statistics import Change, paired_change

FLAT = "flat"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    args = parser.parse_args()
    by_way: dict[str, list[Run]] = defaultdict(list)
    for directory in args.runs:
        run = read_run(directory)
        by_way[way_of(run)].append(run)
    if FLAT not in by_way:
        parser.error("no RUN_DIR has a flat mix: dataset.schedule={} dataset.sampling=uniform")
    args.target.mkdir(parents=True, exist_ok=True)
    for way, runs in by_way.items():
        for run in runs:
            rows = (f"{task},{before:.6g},{after:.6g}" for task, (before, after) in rewards_of(run).items())
            (args.target / f"{way}_{run.seed}.csv").write_text("task,before,after\n" + "\n".join(rows) + "\n")
    (args.target / "summary.md").write_text(summary(by_way))


def way_of(run: Run) -> str:
    dataset = run.config["dataset"]
    ways = ["schedule"] * bool(dataset["schedule"]) + ["difficulty"] * (dataset["sampling"] == "difficulty")
    return "_".join(ways) or FLAT


def rewards_of(run: Run) -> dict[str, tuple[float, float]]:
    """Returns the rewards before and after training, of the held-out tasks that have both."""
    found = {}
    for task, (before, after) in sorted(read_held_out(run).items()):
        if before is not None and after is not None:
            found[task] = (before, after)
    return found


def means(runs: Sequence[Run], env: str, column: int) -> dict[str, float]:
    """Returns the mean over the runs of each task's reward. column: 0 before training, 1 after."""
    of_runs = [rewards_of(run) for run in runs]
    common = set.intersection(*(set(rewards) for rewards in of_runs))
    tasks = sorted(task for task in common if task.startswith(f"{env}/"))
    return {task: statistics.mean(rewards[task][column] for rewards in of_runs) for task in tasks}


def summary(by_way: dict[str, list[Run]]) -> str:
    lines = ["# Curricula beside a flat mix", "", "`python benchmarks/curriculum.py` makes this page.", ""]
    lines += [
        "Rewards on held-out tasks. ± is the 95 % interval over tasks, with the mean over seeds of each.",
        "",
    ]
    for env in by_way[FLAT][0].config["env"]:
        lines += [f"## {env}", "", "| run | change of the reward | of each seed | difference from flat |"]
        lines += ["|---|---|---|---|"]
        flat = means(by_way[FLAT], env, 1)
        for way, runs in by_way.items():
            ordered = sorted(runs, key=lambda run: run.seed)
            each = [change_of([run], env).mean for run in ordered]
            seeds = ", ".join(f"{change:+.3f}" for change in each)
            other = paired_change(flat, means(runs, env, 1)) if way != FLAT else None
            lines.append(f"| {way} | {shown(change_of(runs, env))} | {seeds} | {shown(other)} |")
        lines.append("")
    return "\n".join(lines)


def change_of(runs: Sequence[Run], env: str) -> Change:
    change = paired_change(means(runs, env, 0), means(runs, env, 1))
    assert change, "a run has many held-out tasks"
    return change


def shown(change: Change | None) -> str:
    return f"{change.mean:+.3f} ± {(change.high - change.low) / 2:.3f}" if change else ""


if __name__ == "__main__":
    main()
