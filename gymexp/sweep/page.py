"""A sweep's HTML page: one file that needs no other file, light or dark according to the reader's screen."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import fmean

from gymexp.sweep.plots import colours, curves, finals
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
from gymexp.view.progress import duration

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --dim: #66707b; --line: #d9dee3; --paper: #fff;
  --band: #f5f7f9; --good: #1a7f37; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe4ea; --dim: #8f9aa6; --line: #343b43;
  --paper: #14181d; --band: #1b2027; --good: #57c271; --bad: #f0766a; } }
body { margin: 2rem auto; max-width: 86rem; padding: 0 1.2rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p { margin: .2rem 0; color: var(--dim); } code { font-size: .92em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .32rem .7rem .32rem 0; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; }
td.why { white-space: normal; min-width: 14rem; color: var(--dim); }
tr:hover td { background: var(--band); }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 50%; }
.dim { color: var(--dim); }
.up, .finished { color: var(--good); } .down, .failed, .lost { color: var(--bad); }
svg { max-width: 100%; height: auto; display: block; margin: .4rem 0; }
"""


def results_html(sweep: Sweep, rows: Sequence[Row]) -> str:
    """Returns the HTML page of a sweep, with its plots and tables inside."""
    groups = groups_of(rows)
    colour = colours(groups)
    keys = [key for key in sweep.keys if key != SEED]
    envs = envs_of(rows)
    plots = [curves(env, groups, colour) for env in envs]
    against = finals(groups, sweep.keys, colour)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(sweep.path.name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(sweep.path.parent.name)} · {escape(sweep.path.name)}</h1>",
        f"<p>{escape(counted(sweep))}</p>",
        "<h2>Configurations, the best first</h2>",
        f"<p>Held-out reward before → after training. {escape(INTERVALS)}</p>",
        _table(
            [
                "",
                *map(short, keys),
                "finished",
                *envs,
                *_mean_column(envs),
                "best",
                "scored",
                "time",
                "tokens/s",
                "others",
            ],
            [_group_cells(group, keys, envs, colour[group.name]) for group in ranked(groups)],
        ),
        *(["<h2>Study</h2>", *(f"<p>{escape(line)}</p>" for line in sweep.study)] if sweep.study else []),
        "<h2>Reward over steps</h2>" if plots else "",
        *plots,
        *(["<h2>After training, against each swept key</h2>", against] if against else []),
        "<h2>Jobs</h2>",
        _table(
            [
                "job",
                "",
                *map(short, sweep.keys),
                "state",
                "step",
                "held-out",
                "scored",
                "time",
                "restarts",
                "why",
            ],
            [_job_cells(row, sweep.keys, colour[group.name]) for group in groups for row in group.rows],
        ),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _mean_column(envs: Sequence[str]) -> list[str]:
    return ["mean"] if len(envs) > 1 else []


def _group_cells(group: Group, keys: Sequence[str], envs: Sequence[str], colour: str) -> list[str]:
    columns = [*envs, *([None] if len(envs) > 1 else [])]  # None: the mean over the environments
    rates = [row.tokens_per_s for row in group.rows if row.tokens_per_s is not None]
    return [
        _cell(_dot(colour)),
        *(_cell(escape(group.swept.get(key, ""))) for key in keys),
        _cell(group.seeds),
        *(_cell(_change(group.before(env), group.after(env))) for env in columns),
        _cell(number(group.after().best)),
        _cell(scored(group.finished) or "–"),
        _cell(duration(fmean(row.wall_s for row in group.rows))),
        _cell(f"{fmean(rates):.0f}" if rates else "–"),
        _cell(escape(group.others), "dim"),
    ]


def _job_cells(row: Row, keys: Sequence[str], colour: str) -> list[str]:
    run = row.job.run
    last = run.status.get("max_steps")
    held_out = "<br>".join(
        f"{escape(env)} {number(before)} → {number(after)}"
        + (between(row.over_tasks[env].after) if env in row.over_tasks else "")
        for env, (before, after) in row.held_out.items()
    )
    return [
        _cell(str(row.job.num)),
        _cell(_dot(colour)),
        *(_cell(escape(row.job.swept.get(key, ""))) for key in keys),
        _cell(run.state, run.state),
        _cell(f"{run.step}/{last}" if last else ""),
        _cell(held_out or "–"),
        _cell(scored([row]) or "–"),
        _cell(duration(row.wall_s)),
        _cell(str(run.status.get("restarts") or "")),
        _cell(escape(run.why), "why"),
    ]


def _change(before: Spread, after: Spread) -> str:
    if after.mean is None:
        return "–"
    spread = f'<span class="dim">{between(after.interval)}</span>' if after.interval else ""
    text = f'<span class="dim">{number(before.mean)} →</span> {number(after.mean)}{spread}'
    if before.mean is None:
        return text
    change = after.mean - before.mean
    return f'{text} <span class="{"up" if change > 0 else "down"}">{change:+.3f}</span>'


def _dot(colour: str) -> str:
    return f'<span class="dot" style="background:{colour}"></span>'


def _cell(content: str, kind: str = "") -> str:
    return f'<td class="{kind}">{content}</td>' if kind else f"<td>{content}</td>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
