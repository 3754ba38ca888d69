"""Panels of rollouts: lengths, how they ended, tools, tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

from gymexp.report import figures
from gymexp.report.figures import Number
from gymexp.report.learning_panels import NO_INDEX, NO_STEPS, quantile
from gymexp.report.panel import Chart, Panel, Table
from gymexp.report.run_records import Record, RunRecords
from gymexp.rollout.outcome import Cause

_MAX_TASKS = 400  # of a heat map, each environment; the most and the least solved beyond that are left out
_ENDINGS = {
    "truncated_length": "--c2",
    "truncated_turns": "--c6",
    "refused": "--c4",
    "prompts_too_long": "--c9",
    "failed_environment": "--c8",
    "failed_engine": "--c5",
    "failed_timeout": "--c1",
    "failed_token_mismatch": "--c7",
}
# The metrics that runs have from before endings were counted by cause.
_COARSE = {"truncated": "--c2", "refused": "--c4", "failed": "--c8"}


def causes() -> list[str]:
    """Returns the causes of failed rollouts, of which metrics are counted."""
    return [cause for cause in get_args(Cause) if cause != "prompt_too_long"]


def per_step(
    records: RunRecords, env: str, compute: Callable[[list[Record]], Number | None]
) -> list[Number | None]:
    """Returns a value of the environment's scored training rollouts at each of `steps`."""
    values: list[Number | None] = []
    for step in records.step_numbers:
        rows = records.scored.get((step, env))
        values.append(compute(rows) if rows else None)
    return values


def length_panel(records: RunRecords) -> Panel:
    """Panel 12: sampled tokens and turns of a rollout."""
    about = (
        "Tokens that the policy samples in a rollout: mean, median, 95 % quantile and longest; and its turns."
    )
    charts: list[Chart] = []
    colours, steps = figures.colours_of(records.envs), records.step_numbers
    for env in records.envs:
        tokens = _token_quantiles(records, env, (0.5, 0.95, 1.0))
        traces = figures.line("mean", steps, records.env_series(env, "tokens"), colours[env])
        traces += figures.line("p50", steps, tokens[0], "--c9", dash="dot")
        traces += figures.line("p95", steps, tokens[1], colours[env], faint=True)
        traces += figures.line("max", steps, tokens[2], "--c9", faint=True)
        charts += figures.over_steps(f"{env}: tokens", traces, "tokens", rangemode="tozero")
    traces = []
    for env in records.envs:
        traces += figures.line(env, steps, records.env_series(env, "turns"), colours[env])
    charts += figures.over_steps("turns", traces, "turns", rangemode="tozero", height=200)
    cut = figures.line("cut off", steps, records.series("completions/clipped_ratio"), "--c2")
    charts += figures.over_steps(
        "rollouts without an end token (TRL)", cut, "share", rangemode="tozero", height=200
    )
    notes = [] if charts else [NO_STEPS]
    if charts and not records.rows:
        notes = [f"No quantiles: {NO_INDEX}"]
    return Panel("lengths", "Lengths", about, charts, notes=notes)


def _token_quantiles(records: RunRecords, env: str, shares: Sequence[float]) -> list[list[Number | None]]:
    """Returns the quantiles of a rollout's tokens, one series for each share."""
    ordered = [
        sorted(row["tokens"] for row in records.scored.get((step, env), ())) for step in records.step_numbers
    ]
    return [[quantile(tokens, share) if tokens else None for tokens in ordered] for share in shares]


def ending_panel(records: RunRecords) -> Panel:
    """Panel 13: rollouts that a limit cut off, that were refused, and that failed, by cause."""
    about = "Share of a step's rollouts that a limit cut off, that the environment refused, or that failed."
    steps, charts = records.step_numbers, []
    for env in records.envs:
        names = (
            _ENDINGS if any(v is not None for v in records.env_series(env, "truncated_length")) else _COARSE
        )
        parts = {name.replace("_", " "): records.env_series(env, name) for name in names}
        colours = {name.replace("_", " "): colour for name, colour in names.items()}
        charts += figures.over_steps(
            env, figures.stack(steps, parts, colours), "share of rollouts", rangemode="tozero"
        )
    traces: list[dict[str, Any]] = []
    for env, colour in figures.colours_of(records.envs).items():
        for metric, dash in (("retried", "solid"), ("token_mismatches", "dot")):
            values = records.env_series(env, metric)
            if any(values):
                traces += figures.line(f"{env} {metric.replace('_', ' ')}", steps, values, colour, dash=dash)
    charts += figures.over_steps(
        "retries a rollout, and attempts with inexact tokens", traces, "", height=200
    )
    notes = []
    if not records.steps:
        notes.append(NO_STEPS)
    elif not charts:
        notes.append("No training rollout was cut off, refused, retried or failed.")
    return Panel("endings", "How rollouts ended", about, charts, notes=notes)


def tool_panel(records: RunRecords) -> Panel:
    """Panel 14: tool calls of a rollout, and the share that the tools answered with an error."""
    about = "Tool calls in a rollout, and the share of them that a tool answered with an error."
    colours, steps = figures.colours_of(records.envs), records.step_numbers
    calls: list[dict[str, Any]] = []
    errors: list[dict[str, Any]] = []
    for env in records.envs:
        series = records.env_series(env, "tool_calls")
        if any(series):
            calls += figures.line(env, steps, series, colours[env])
            errors += figures.line(env, steps, _error_shares(records, env), colours[env])
    charts = figures.over_steps("calls a rollout", calls, "calls", rangemode="tozero")
    charts += figures.over_steps(
        "calls that end with an error", errors, "share", rangemode="tozero", height=200
    )
    notes = []
    if not records.steps:
        notes.append(NO_STEPS)
    elif not calls and all(v is None for env in records.envs for v in records.env_series(env, "tool_calls")):
        notes.append("Tool calls: this run was made before gymexp counted them.")
    elif not calls:
        notes.append("No rollout called a tool.")
    elif not errors:
        notes.append("Errors of tools: this run was made before gymexp counted them.")
    return Panel("tools", "Tools", about, charts, notes=notes)


def _error_shares(records: RunRecords, env: str) -> list[Number | None]:
    def share(rows: list[Record]) -> Number | None:
        counted = [row for row in rows if row.get("tool_errors") is not None]
        calls = sum(row.get("tool_calls", 0) for row in counted)
        return sum(row["tool_errors"] for row in counted) / calls if calls else None

    return per_step(records, env, share)


def solved_shares(rows: Iterable[Record], env: str) -> dict[str, float]:
    """Returns the solved share of an environment's rollouts by task, without failed ones."""
    solved: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row["env"] == env and row.get("reward") is not None:
            solved[row["key"]].append(bool(row.get("success")))
    return {key: sum(values) / len(values) for key, values in solved.items()}


def task_panel(records: RunRecords) -> Panel:
    """Panel 19: which tasks are solved when: held-out as a heat map, training as a table."""
    about = "A row of a map is a held-out task, the always solved at the top."
    if not records.rows:
        return Panel("tasks", "Tasks", about, notes=[NO_INDEX if records.steps else NO_STEPS])
    charts: list[Chart] = []
    rows: list[list[str]] = []
    for env in records.envs:
        by_step = {step: solved_shares(of, env) for step, of in records.rows_of_evaluation.items()}
        by_step = {step: shares for step, shares in by_step.items() if shares}
        charts += [_heat_map(records, env, by_step)] if by_step else []
        for kind, of in (
            ("held-out, all evaluations", records.rows_of_evaluation),
            ("training", records.rows_of_step),
        ):
            shares = list(solved_shares((row for part in of.values() for row in part), env).values())
            if shares:
                always, never = sum(s == 1 for s in shares), sum(s == 0 for s in shares)
                counts = (len(shares), always, len(shares) - always - never, never)
                rows.append([env, kind, *map(str, counts)])
    head = ["environment", "tasks", "seen", "always solved", "sometimes", "never"]
    return Panel("tasks", "Tasks", about, charts, [Table(head, rows, (2, 3, 4, 5))], wide=True)


def _heat_map(records: RunRecords, env: str, by_step: dict[int, dict[str, float]]) -> Chart:
    keys = {key for shares in by_step.values() for key in shares}
    means = {key: _mean([s[key] for s in by_step.values() if key in s]) for key in keys}
    order = sorted(keys, key=lambda key: (means[key], key))  # plotly draws the first row at the bottom
    if len(order) > _MAX_TASKS:
        order = [order[i * len(order) // _MAX_TASKS] for i in range(_MAX_TASKS)]
    steps = list(by_step)[-60:]
    over = "policy" if records.is_evaluation else "evaluation after step"
    layout = figures.layout("tasks", over, height=min(420, 140 + 3 * len(order)))
    layout["yaxis"] |= {"showticklabels": False, "showgrid": False, "ticks": ""}
    layout["xaxis"] |= {"type": "category", "showgrid": False}
    layout |= {"hovermode": "closest", "showlegend": False}
    trace = figures.SOLVED | {
        "meta": figures.EVALUATION,
        "x": [figures.label(records.name_of_evaluation(step)) for step in steps],
        "y": [figures.label(key.removeprefix(f"{env}/validation/")) for key in order],
        "z": [[figures.compact(by_step[step].get(key)) for step in steps] for key in order],
        "hovertemplate": "task %{y}<br>%{x}: solved %{z}<extra></extra>",
    }
    layout["yaxis"]["type"] = "category"
    return Chart(f"{env}: {len(keys)} held-out tasks", {"": {"data": [trace], "layout": layout}})


def _mean(values: Sequence[Number]) -> float:
    return sum(values) / len(values)
