"""A sweep as tables: the states of its jobs, and its results with the seeds of a configuration combined."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from gymexp.printable import csv_cell
from gymexp.record.run_state import tokens_per_s, wall_seconds
from gymexp.report.held_out import HeldOut, read_held_out
from gymexp.statistics import Interval, mean_over_tasks
from gymexp.sweep.sweep import Job, Sweep
from gymexp.view.progress import duration

SEED = "seed"
INTERVALS = (
    "[ ]: the 95 % interval of the reward after training, over the finished seeds; of a single run over its "
    "held-out tasks, which says nothing of other seeds."
)


@dataclass(frozen=True)
class Row:
    """One run's results.

    held_out: `{env: (before, after)}`, the mean held-out reward before training and at the newest evaluation
    after a training step; None if not measured. tokens_per_s: None if no tokens were counted. over_tasks: of
    each environment whose held-out rollouts are in the index, the intervals and counts.
    """

    job: Job
    held_out: dict[str, tuple[float | None, float | None]]
    wall_s: float
    tokens_per_s: float | None
    over_tasks: dict[str, HeldOut]

    @property
    def finished(self) -> bool:
        return self.job.run.state == "finished"

    def reward(self, env: str | None) -> tuple[float | None, float | None]:
        """Returns the held-out reward before and after training; with env None the mean over environments."""
        return self.held_out.get(env, (None, None)) if env else self.mean

    @property
    def mean(self) -> tuple[float | None, float | None]:
        """The held-out reward before and after training, each the mean over the environments."""
        return (_mean([b for b, _ in self.held_out.values()]), _mean([a for _, a in self.held_out.values()]))


@dataclass(frozen=True)
class Spread:
    """Statistics of the finished seeds' rewards: mean, sample standard deviation (None with fewer than two
    rewards), best, number of rewards, and 95 % interval (None if it is unknown)."""

    mean: float | None
    std: float | None
    best: float | None
    n: int
    interval: Interval | None

    @classmethod
    def of(cls, values: Sequence[float | None], over_tasks: Interval | None = None) -> Spread:
        """over_tasks: the interval if there is a single reward; that of several is over them."""
        measured = [value for value in values if value is not None]
        if not measured:
            return cls(None, None, None, 0, None)
        if len(measured) == 1:
            return cls(measured[0], None, measured[0], 1, over_tasks)
        interval = mean_over_tasks({str(seed): value for seed, value in enumerate(measured)})
        return cls(fmean(measured), stdev(measured), max(measured), len(measured), interval)


@dataclass(frozen=True)
class Group:
    """The runs of one configuration. swept: the swept keys without the seed, with their values."""

    swept: dict[str, str]
    rows: list[Row]

    @property
    def name(self) -> str:
        return "  ".join(f"{short(key)}={value}" for key, value in self.swept.items()) or "all seeds"

    @property
    def finished(self) -> list[Row]:
        return [row for row in self.rows if row.finished]

    def after(self, env: str | None = None) -> Spread:
        """Returns the finished runs' held-out rewards after training as a Spread; env None: of the means over
        the environments."""
        measured = [row.over_tasks[env] for row in self.finished if env in row.over_tasks]
        over_tasks = measured[0].after if len(measured) == 1 else None
        return Spread.of([row.reward(env)[1] for row in self.finished], over_tasks)

    def before(self, env: str | None = None) -> Spread:
        """Returns the finished runs' held-out rewards before training as a Spread; env as in `after`."""
        return Spread.of([row.reward(env)[0] for row in self.finished])

    @property
    def seeds(self) -> str:
        """The number of finished runs, of all runs, as `2/3`."""
        return f"{len(self.finished)}/{len(self.rows)}"

    @property
    def others(self) -> str:
        """The states of the runs that have not finished, as `1 failed, 1 lost`."""
        states = [row.job.run.state for row in self.rows if not row.finished]
        return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def rows_of(sweep: Sweep) -> list[Row]:
    """Returns a row for each job of the sweep."""
    return [
        Row(
            job,
            job.run.held_out,
            wall_seconds(job.run),
            tokens_per_s(job.run),
            read_held_out(job.run.path / "rollouts"),
        )
        for job in sweep.jobs
    ]


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Returns the rows grouped by configuration, in the order of the jobs."""
    by_swept: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        by_swept.setdefault(tuple((k, v) for k, v in row.job.swept.items() if k != SEED), []).append(row)
    return [Group(dict(swept), group_rows) for swept, group_rows in by_swept.items()]


def envs_of(rows: Sequence[Row]) -> list[str]:
    """Returns the environments with held-out rewards in any row, in the order of the rows."""
    return list(dict.fromkeys(env for row in rows for env in row.held_out))


def status_table(sweep: Sweep) -> str:
    """Returns a table with a line for each job, then the number of jobs in each state, then a line for each
    job whose state has a reason."""
    lines: list[Sequence[str]] = [
        ("job", "state", "step", *map(short, sweep.keys), "phase", "restarts", "held-out", "slurm")
    ]
    for job in sweep.jobs:
        run, status = job.run, job.run.status
        last = status.get("max_steps")
        lines.append(
            (
                str(job.num),
                run.state,
                f"{run.step}/{last}" if last else "",
                *(job.swept.get(key, "") for key in sweep.keys),
                "" if run.ended else str(status.get("phase", "")),
                str(status.get("restarts") or ""),
                "  ".join(f"{env} {_arrow(b, a)}" for env, (b, a) in run.held_out.items()),
                job.job_id or "",
            )
        )
    reasons = [reason(job) for job in sweep.jobs if job.run.why]
    return "\n".join([columns(lines), "", counted(sweep), *reasons])


def job_line(job: Job) -> str:
    """Returns a job's state in a line: `job 3  train 4/32  sudoku 0.250 → 0.500`."""
    run, last = job.run, job.run.status.get("max_steps")
    held_out = (f"{env} {_arrow(b, a)}" for env, (b, a) in run.held_out.items())
    at = run.state if run.ended or run.state == "waiting" else str(run.status.get("phase", run.state))
    parts = [f"job {job.num}", f"{at} {run.step}/{last}" if last else at, *held_out, run.why]
    return "  ".join(part for part in parts if part)


def counted(sweep: Sweep) -> str:
    """Returns the number of jobs in each state: `4 jobs: 3 finished, 1 failed`."""
    states = [job.run.state for job in sweep.jobs]
    each = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{len(states)} jobs: {each}"


def reason(job: Job) -> str:
    """Returns a line with a job's state and its reason; for a failed or lost job also the most useful log."""
    log = f"  (log: {job.run.log})" if job.run.state in ("failed", "lost") and job.run.log else ""
    return f"job {job.num} {job.run.state}: {job.run.why}{log}"


def results_table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Returns a table with a line for each configuration, the best first. Rewards are means over the finished
    seeds, with the intervals that INTERVALS explains; time and tokens/s are means over all runs."""
    keys = [key for key in keys if key != SEED]
    envs = envs_of(rows)
    mean_column = ["mean"] if len(envs) > 1 else []
    lines: list[Sequence[str]] = [
        (*map(short, keys), "finished", *envs, *mean_column, "best", "scored", "time", "tokens/s", "others")
    ]
    for group in ranked(groups_of(rows)):
        column_envs = (*envs, *([None] if mean_column else []))  # None: the mean over the environments
        spreads = [(group.before(env), group.after(env)) for env in column_envs]
        rates = [row.tokens_per_s for row in group.rows]
        lines.append(
            (
                *(group.swept.get(key, "") for key in keys),
                group.seeds,
                *(_arrow(before.mean, after.mean, after.interval) for before, after in spreads),
                number(group.after().best),
                scored(group.finished),
                duration(fmean(row.wall_s for row in group.rows)),
                f"{rate:.0f}" if (rate := _mean(rates)) else "–",
                group.others,
            )
        )
    return "\n".join([columns(lines), INTERVALS])


def scored(rows: Sequence[Row]) -> str:
    """Returns how many held-out rollouts of the runs' newest evaluations were scored, planned and failed:
    `238/240, 2 failed`. Empty if no run has an index of its rollouts."""
    found = [of_env for row in rows for of_env in row.over_tasks.values()]
    num_scored, num_failed = sum(f.num_scored for f in found), sum(f.num_failed for f in found)
    return f"{num_scored}/{num_scored + num_failed}, {num_failed} failed" if found else ""


def ranked(groups: Sequence[Group]) -> list[Group]:
    """Returns the groups with the highest mean held-out reward after training first, and those without a
    reward last."""
    return sorted(groups, key=lambda g: -(m if (m := g.after().mean) is not None else float("-inf")))


def results_csv(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Returns the results as CSV: a line of kind `run` for each job, then a line of kind `seeds` for each
    configuration. Its rewards are mean, `_std` and best over the finished runs; wall_s and tokens_per_s are
    means over all runs. `_low` and `_high` are the ends of the 95 % interval: of a run over its held-out
    tasks, of a configuration with several finished runs over these."""
    envs = envs_of(rows)
    head = ["kind", "job", *keys, "state", "why", "n", "step"]
    for name in (*envs, "mean"):
        head += [f"{name}_before", f"{name}_after", f"{name}_after_std"]
        head += [f"{name}_after_low", f"{name}_after_high"]
    head += ["held_out_scored", "held_out_failed", "best", "wall_s", "tokens_per_s", "restarts", "directory"]
    out = io.StringIO()
    writer = csv.DictWriter(out, head, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        run = row.job.run
        record: dict[str, Any] = {"kind": "run", "job": row.job.num, **row.job.swept}
        record |= {"state": run.state, "why": run.why, "step": run.step, "directory": run.path}
        record |= {"wall_s": round(row.wall_s, 1), "tokens_per_s": row.tokens_per_s}
        record |= {"restarts": run.status.get("restarts") or 0}
        for name, (before, after) in (row.held_out | {"mean": row.mean}).items():
            record |= {f"{name}_before": before, f"{name}_after": after}
        for env, found in row.over_tasks.items():
            record |= _ends(env, found.after)
        if row.over_tasks:
            record["held_out_scored"] = sum(found.num_scored for found in row.over_tasks.values())
            record["held_out_failed"] = sum(found.num_failed for found in row.over_tasks.values())
        writer.writerow({name: csv_cell(value) for name, value in record.items()})
    for group in groups_of(rows):
        record = {"kind": "seeds", **group.swept, "state": group.others, "n": len(group.finished)}
        for name in (*envs, "mean"):
            before, after = (of(None if name == "mean" else name) for of in (group.before, group.after))
            record |= {
                f"{name}_before": before.mean,
                f"{name}_after": after.mean,
                f"{name}_after_std": after.std,
            } | _ends(name, after.interval)
        record |= {"best": group.after().best, "wall_s": round(fmean(row.wall_s for row in group.rows), 1)}
        record |= {"tokens_per_s": _mean([row.tokens_per_s for row in group.rows])}
        writer.writerow({name: csv_cell(value) for name, value in record.items()})
    return out.getvalue()


def _ends(name: str, interval: Interval | None) -> dict[str, float]:
    return {f"{name}_after_low": interval.low, f"{name}_after_high": interval.high} if interval else {}


def short(key: str) -> str:
    """Returns a key as a column's head: `learning_rate` for `trainer.learning_rate`, other keys unchanged."""
    return key.rpartition(".")[2] if key.startswith("trainer.") else key


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Returns the lines as left-aligned columns. A column is left out if all its cells but the head are
    empty."""
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in kept}
    return "\n".join("  ".join(line[i].ljust(widths[i]) for i in kept).rstrip() for line in lines)


def number(value: float | None) -> str:
    """Returns a reward with three decimals, or a dash for None."""
    return "–" if value is None else f"{value:.3f}"


def _arrow(before: float | None, after: float | None, interval: Interval | None = None) -> str:
    if before is None and after is None:
        return "–"
    return f"{number(before)} → {number(after)}{between(interval)}"


def between(interval: Interval | None) -> str:
    """Returns the ends of an interval as ` [0.412, 0.588]`, or "" for None."""
    return f" [{interval.low:.3f}, {interval.high:.3f}]" if interval else ""


def _mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean of the values that are not None, or None if all are."""
    measured = [value for value in values if value is not None]
    return fmean(measured) if measured else None
