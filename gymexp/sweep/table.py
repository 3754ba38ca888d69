"""A sweep as tables: how its jobs stand, and what came of them, seeds taken together."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from gymexp.record.state import tokens_per_s, wall_seconds
from gymexp.sweep.sweep import Job, Sweep
from gymexp.view.progress import duration

SEED = "seed"


@dataclass(frozen=True)
class Row:
    """One run's results. held_out: `{env: (before, after)}`; after is of the newest evaluation after a
    step."""

    job: Job
    held_out: dict[str, tuple[float | None, float | None]]
    wall_s: float
    tokens_per_s: float | None

    @property
    def finished(self) -> bool:
        return self.job.run.state == "finished"

    def reward(self, env: str | None) -> tuple[float | None, float | None]:
        """Before and after; env None: the mean over the environments."""
        return self.held_out.get(env, (None, None)) if env else self.mean

    @property
    def mean(self) -> tuple[float | None, float | None]:
        """Before and after, each the mean over the environments."""
        return (_mean([b for b, _ in self.held_out.values()]), _mean([a for _, a in self.held_out.values()]))


@dataclass(frozen=True)
class Spread:
    """Of finished seeds: mean, sample standard deviation (None of fewer than two), best, how many."""

    mean: float | None
    std: float | None
    best: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        there = [v for v in values if v is not None]
        if not there:
            return cls(None, None, None, 0)
        return cls(fmean(there), stdev(there) if len(there) > 1 else None, max(there), len(there))


@dataclass(frozen=True)
class Group:
    """The runs of one configuration: all that is swept but the seed."""

    swept: dict[str, str]
    rows: list[Row]

    @property
    def name(self) -> str:
        return "  ".join(f"{short(key)}={value}" for key, value in self.swept.items()) or "all seeds"

    @property
    def finished(self) -> list[Row]:
        return [row for row in self.rows if row.finished]

    def after(self, env: str | None = None) -> Spread:
        """Of finished runs; env None: the mean over the environments."""
        return Spread.of([row.reward(env)[1] for row in self.finished])

    def before(self, env: str | None = None) -> Spread:
        return Spread.of([row.reward(env)[0] for row in self.finished])

    @property
    def seeds(self) -> str:
        """How many of its runs have finished."""
        return f"{len(self.finished)}/{len(self.rows)}"

    @property
    def others(self) -> str:
        """How the runs stand that have not."""
        states = [row.job.run.state for row in self.rows if not row.finished]
        return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def rows_of(sweep: Sweep) -> list[Row]:
    """A row for each job."""
    return [Row(j, j.run.held_out, wall_seconds(j.run), tokens_per_s(j.run)) for j in sweep.jobs]


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """In the order of the jobs."""
    found: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple((k, v) for k, v in row.job.swept.items() if k != SEED), []).append(row)
    return [Group(dict(swept), some) for swept, some in found.items()]


def envs_of(rows: Sequence[Row]) -> list[str]:
    """The environments that the rows have held-out rewards of, in their order."""
    return list(dict.fromkeys(env for row in rows for env in row.held_out))


def status_table(sweep: Sweep) -> str:
    """A line a job, then a line for each that ended otherwise than it should."""
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
    told = [columns(lines), "", counted(sweep)]
    told += [reason(job) for job in sweep.jobs if job.run.why]
    return "\n".join(told)


def job_line(job: Job) -> str:
    """A job in a line: `job 3  train 4/32  sudoku 0.250 → 0.500`."""
    run, last = job.run, job.run.status.get("max_steps")
    held_out = (f"{env} {_arrow(b, a)}" for env, (b, a) in run.held_out.items())
    at = run.state if run.ended or run.state == "waiting" else str(run.status.get("phase", run.state))
    parts = [f"job {job.num}", f"{at} {run.step}/{last}" if last else at, *held_out, run.why]
    return "  ".join(part for part in parts if part)


def counted(sweep: Sweep) -> str:
    """How many jobs there are in each state."""
    states = [job.run.state for job in sweep.jobs]
    each = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{len(states)} jobs: {each}"


def reason(job: Job) -> str:
    """Why a job is in its state, with the log that tells most."""
    log = f"  (log: {job.run.log})" if job.run.state in ("failed", "lost") and job.run.log else ""
    return f"job {job.num} {job.run.state}: {job.run.why}{log}"


def results_table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """A line a configuration, with its seeds taken together, the best first; ± is their sample standard
    deviation."""
    keys = [key for key in keys if key != SEED]
    envs = envs_of(rows)
    over = ["mean"] if len(envs) > 1 else []
    lines: list[Sequence[str]] = [
        (*map(short, keys), "finished", *envs, *over, "best", "time", "tokens/s", "others")
    ]
    for group in ranked(groups_of(rows)):
        spreads = [(group.before(env), group.after(env)) for env in (*envs, *([None] if over else []))]
        rates = [row.tokens_per_s for row in group.rows]
        lines.append(
            (
                *(group.swept.get(key, "") for key in keys),
                group.seeds,
                *(_arrow(before.mean, after.mean, after.std) for before, after in spreads),
                number(group.after().best),
                duration(fmean(row.wall_s for row in group.rows)),
                f"{rate:.0f}" if (rate := _mean(rates)) else "–",
                group.others,
            )
        )
    return columns(lines)


def ranked(groups: Sequence[Group]) -> list[Group]:
    """By their mean held-out reward after training; those without one last."""
    return sorted(groups, key=lambda g: -(m if (m := g.after().mean) is not None else float("-inf")))


def results_csv(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Lines of kind `run`, one a job, then of kind `seeds`, one a configuration: mean, `_std` and best over
    its finished runs."""
    envs = envs_of(rows)
    head = ["kind", "job", *keys, "state", "why", "n", "step"]
    for name in (*envs, "mean"):
        head += [f"{name}_before", f"{name}_after", f"{name}_after_std"]
    head += ["best", "wall_s", "tokens_per_s", "restarts", "directory"]
    out = io.StringIO()
    writer = csv.DictWriter(out, head, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        run = row.job.run
        said: dict[str, Any] = {"kind": "run", "job": row.job.num, **row.job.swept}
        said |= {"state": run.state, "why": run.why, "step": run.step, "directory": run.path}
        said |= {"wall_s": round(row.wall_s, 1), "tokens_per_s": row.tokens_per_s}
        said |= {"restarts": run.status.get("restarts") or 0}
        for name, (before, after) in (row.held_out | {"mean": row.mean}).items():
            said |= {f"{name}_before": before, f"{name}_after": after}
        writer.writerow(said)
    for group in groups_of(rows):
        said = {"kind": "seeds", **group.swept, "state": group.others, "n": len(group.finished)}
        for name in (*envs, "mean"):
            before, after = (of(None if name == "mean" else name) for of in (group.before, group.after))
            said |= {
                f"{name}_before": before.mean,
                f"{name}_after": after.mean,
                f"{name}_after_std": after.std,
            }
        said |= {"best": group.after().best, "wall_s": round(fmean(row.wall_s for row in group.rows), 1)}
        said |= {"tokens_per_s": _mean([row.tokens_per_s for row in group.rows])}
        writer.writerow(said)
    return out.getvalue()


def short(key: str) -> str:
    """`trainer.learning_rate` as a column's head."""
    return key.rpartition(".")[2] if key.startswith("trainer.") else key


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Left-aligned text; a column that is empty but for its head is left out."""
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in kept}
    return "\n".join("  ".join(line[i].ljust(widths[i]) for i in kept).rstrip() for line in lines)


def number(value: float | None) -> str:
    """A reward with three digits; a dash for none."""
    return "–" if value is None else f"{value:.3f}"


def _arrow(before: float | None, after: float | None, std: float | None = None) -> str:
    if before is None and after is None:
        return "–"
    return f"{number(before)} → {number(after)}" + (f" ± {std:.3f}" if std is not None else "")


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return fmean(there) if there else None
