"""Compares overlap with runs in turn: makes the files of docs/results/overlap from the runs of a sweep.

    python -m gymexp.train -m experiment=quickstart seed=0,1,2 overlap.max_staleness=0,1,4
    python benchmarks/overlap.py docs/results/overlap outputs/quickstart/sweep_<date_time>/*/

The runs differ by overlap.max_staleness and seed. summary.md has the reward on held-out tasks after training,
at each evaluation, the staleness of what was trained, and the seconds of a step. A CSV file a run has the
reward of each held-out task, and steps.csv has the metrics of each step that the page is made of.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from learning import Run, deviation, series
from ways import ByWay, read_ways, reward_tables

IN_TURN = "in_turn"
STALENESS = ("staleness/mean", "staleness/max", "overlap/turns_cut", "idle/trainer")
STEP = ("seconds", *STALENESS, "sampling/ratio_max", "sampling/clipped", "drift")


def main() -> None:
    target, by_way = read_ways(__doc__ or "", way_of, IN_TURN, "overlap.max_staleness=0")
    lines = ["# Overlap beside runs in turn", "", "`python benchmarks/overlap.py` makes this page.", ""]
    lines += reward_tables(by_way, IN_TURN)
    for env in by_way[IN_TURN][0].config["env"]:
        lines += curve(by_way, env)
    (target / "summary.md").write_text("\n".join([*lines, *steps(by_way)]))
    write_steps(by_way, target / "steps.csv")


def way_of(run: Run) -> str:
    bound = run.config["overlap"]["max_staleness"]
    return f"max_staleness_{bound}" if bound else IN_TURN


def curve(by_way: ByWay, env: str) -> list[str]:
    """Returns a table of the mean held-out reward at each evaluation, with its deviation over seeds."""
    columns = {way: series(runs, f"eval_{env}/reward") for way, runs in by_way.items()}
    at = [int(step) for step in columns[IN_TURN][0]]
    lines = [
        f"Held-out reward of {env} by optimizer step: the mean of seeds, and their deviation (n - 1).",
        "",
    ]
    lines += [f"| run | {' | '.join(map(str, at))} |", f"|---{'|---' * len(at)}|"]
    for way, (_, values) in columns.items():
        cells = zip(values.mean(axis=0), deviation(values), strict=True)
        lines.append(f"| {way} | {' | '.join(f'{mean:.3f} ({sd:.3f})' for mean, sd in cells)} |")
    return [*lines, ""]


def steps(by_way: ByWay) -> list[str]:
    """Returns a table of what the steps measured: means over all steps and seeds, or the largest value."""
    lines = ["## Steps", ""]
    lines += [
        "| run | mean staleness | largest | turns cut a step | trainer idle | largest drift | seconds |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for way, runs in by_way.items():
        means = {name: statistics.mean(values_of(runs, name) or [0]) for name in STEP}
        largest = {name: max(values_of(runs, name), default=0) for name in STEP}
        cells = [
            f"{means['staleness/mean']:.2f}",
            f"{largest['staleness/max']:.0f}",
            f"{means['overlap/turns_cut']:.1f}",
            f"{means['idle/trainer']:.0%}" if way != IN_TURN else "",
            f"{largest['drift']:.1e}",
            f"{means['seconds']:.2f}",
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return [*lines, ""]


def values_of(runs: Sequence[Run], name: str) -> list[float]:
    return [
        line[name] for run in runs for line in run.lines if "seconds" in line and line.get(name) is not None
    ]


def write_steps(by_way: ByWay, path: Path) -> None:
    rows = [f"run,seed,step,{','.join(STEP)}"]
    for way, runs in by_way.items():
        for run in runs:
            for line in run.lines:
                if "seconds" in line:
                    cells = ("" if line.get(name) is None else f"{line[name]:.6g}" for name in STEP)
                    rows.append(f"{way},{run.seed},{line['step']},{','.join(cells)}")
    path.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
