"""Compares curricula with a flat mix: makes the files of docs/results/curriculum from the runs of a sweep.

    python -m gymexp.train --config-dir sweeps --config-name curriculum experiment=quickstart
    python benchmarks/curriculum.py docs/results/curriculum outputs/quickstart/sweep_<date_time>/*/

The runs differ by dataset.schedule, dataset.sampling and seed. summary.md has the reward on held-out tasks
before and after training, and how each curriculum differs from the flat mix, paired over the tasks. A CSV
file a run has the reward of each held-out task.
"""

from __future__ import annotations

from learning import Run
from ways import read_ways, reward_tables

FLAT = "flat"


def main() -> None:
    flat = "a flat mix: dataset.schedule={} dataset.sampling=uniform"
    target, by_way = read_ways(__doc__ or "", way_of, FLAT, flat)
    lines = ["# Curricula beside a flat mix", "", "`python benchmarks/curriculum.py` makes this page.", ""]
    (target / "summary.md").write_text("\n".join([*lines, *reward_tables(by_way, FLAT)]))


def way_of(run: Run) -> str:
    dataset = run.config["dataset"]
    ways = ["schedule"] * bool(dataset["schedule"]) + ["difficulty"] * (dataset["sampling"] == "difficulty")
    return "_".join(ways) or FLAT


if __name__ == "__main__":
    main()
