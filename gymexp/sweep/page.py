"""A sweep's HTML page: one file that needs no other file, with a link to the report of each run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from gymexp.config.redaction import without_secrets
from gymexp.printable import duration
from gymexp.report.page import page, path_name
from gymexp.report.panel import Panel, Table
from gymexp.sweep.plots import colours, curves, finals, report_of
from gymexp.sweep.sweep import Sweep
from gymexp.sweep.table import (
    INTERVALS,
    SEED,
    Group,
    Row,
    Spread,
    between,
    counted,
    envs_of,
    groups_of,
    number,
    ranked,
    scored,
    short,
)


def results_html(sweep: Sweep, rows: Sequence[Row]) -> str:
    """Returns the HTML page of a sweep, with its charts and tables inside."""
    groups = groups_of(rows)
    colour = colours(groups)
    envs = envs_of(rows)
    about = f"Held-out reward before → after training. {INTERVALS}"
    ranking = _configurations(sweep, groups, envs, colour)
    panels = [Panel("configurations", "Configurations, the best first", about, tables=[ranking], wide=True)]
    if sweep.study:
        panels.append(Panel("study", "Study", tables=[Table(["study"], [[line] for line in sweep.study])]))
    if charts := [chart for env in envs for chart in curves(env, groups, colour)]:
        about = "Each line is the mean over a configuration's seeds, in its colour of the table above. "
        about += "Its area: ± their standard deviation."
        panels.append(Panel("curves", "Reward over steps", about, charts, wide=True))
    if charts := finals(groups, sweep.keys, colour):
        about = "Each point is a finished run: its held-out reward after training, mean over environments. "
        about += "A click opens the run's report."
        panels.append(Panel("finals", "After training, against each swept key", about, charts, wide=True))
    about = "The number of a job leads to the report of its run."
    panels.append(Panel("jobs", "Jobs", about, tables=[_jobs(sweep, groups, colour)], wide=True))
    running = any(not job.run.ended for job in sweep.jobs)
    state = "running" if running else "finished"
    return page(path_name(sweep.path), state, "", [counted(sweep)], (), panels, None)


def _configurations(
    sweep: Sweep, groups: Sequence[Group], envs: Sequence[str], colour: dict[str, str]
) -> Table:
    keys = [key for key in sweep.keys if key != SEED]
    mean = ["mean"] if len(envs) > 1 else []
    head = [*(map(short, keys) if keys else ["configuration"]), "finished", *envs, *mean, "best", "scored"]
    head += ["time", "tokens/s", "others"]
    best = ranked(groups)
    dots = [colour[group.name] for group in best]
    return Table(head, [_group_cells(group, keys, envs) for group in best], dots=dots)


def _group_cells(group: Group, keys: Sequence[str], envs: Sequence[str]) -> list[str]:
    columns = [*envs, *([None] if len(envs) > 1 else [])]  # None: the mean over the environments
    rates = [row.tokens_per_s for row in group.rows if row.tokens_per_s is not None]
    return [
        *((group.swept.get(key, "") for key in keys) if keys else [group.name]),
        group.seeds,
        *(_change(group.before(env), group.after(env)) for env in columns),
        number(group.after().best),
        scored(group.finished) or "–",
        duration(fmean(row.wall_s for row in group.rows)),
        f"{fmean(rates):.0f}" if rates else "–",
        group.others,
    ]


def _change(before: Spread, after: Spread) -> str:
    if after.mean is None:
        return "–"
    text = f"{number(before.mean)} → {number(after.mean)}{between(after.interval) if after.interval else ''}"
    return text if before.mean is None else f"{text} {after.mean - before.mean:+.3f}"


def _jobs(sweep: Sweep, groups: Sequence[Group], colour: dict[str, str]) -> Table:
    head = ["job", *map(short, sweep.keys), "state", "step", "held-out", "scored", "time", "restarts", "why"]
    rows = [(group, row) for group in groups for row in group.rows]
    links = [report_of(row) for _, row in rows]
    dots = [colour[group.name] for group, _ in rows]
    return Table(head, [_job_cells(row, sweep.keys) for _, row in rows], dots=dots, links=links)


def _job_cells(row: Row, keys: Sequence[str]) -> list[str]:
    run = row.job.run
    last = run.status.get("max_steps")
    held_out = ", ".join(
        f"{env} {number(before)} → {number(after)}"
        + (between(row.over_tasks[env].after) if env in row.over_tasks else "")
        for env, (before, after) in row.held_out.items()
    )
    return [
        str(row.job.num),
        *(row.job.swept.get(key, "") for key in keys),
        run.state,
        f"{run.step}/{last}" if last else "",
        held_out or "–",
        scored([row]) or "–",
        duration(row.wall_s),
        str(run.status.get("restarts") or ""),
        without_secrets(run.why),
    ]
