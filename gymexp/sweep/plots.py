"""A sweep's charts for its page: reward curves of the configurations over each other, and final rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from gymexp.record.metric_names import of_each_env
from gymexp.report import figures
from gymexp.report.page import FILE
from gymexp.report.panel import Chart
from gymexp.sweep.table import SEED, Group, Row, short


def colours(groups: Sequence[Group]) -> dict[str, str]:
    """Returns a colour for each configuration, by its name; after ten they repeat."""
    return figures.colours_of([group.name for group in groups])


def curves(env: str, groups: Sequence[Group], colour: Mapping[str, str]) -> list[Chart]:
    """Returns the charts of the held-out and the training reward of one environment over steps: the mean over
    seeds, ± their sample standard deviation."""
    charts: list[Chart] = []
    for held_out in (True, False):
        traces: list[dict[str, Any]] = []
        for group in groups:
            series = [_series(row, env, held_out) for row in group.rows]
            traces += _mean_and_spread(group.name, series, colour[group.name], held_out)
        title = f"{env}: {'held-out' if held_out else 'training'} reward"
        charts += figures.over_steps(title, traces, "reward", height=260)
        for chart in charts[-1:] if traces else ():
            chart.figures[""]["layout"]["showlegend"] = False
    return charts


def finals(groups: Sequence[Group], keys: Sequence[str], colour: Mapping[str, str]) -> list[Chart]:
    """Returns charts of each finished run's held-out reward after training (mean over the environments)
    against each swept key; none if no run has finished, or only seeds are swept. A click on a point opens the
    report of its run."""
    finished = [(g, row) for g in groups for row in g.finished if row.mean[1] is not None]
    charts: list[Chart] = []
    for key in keys:
        points = [(g, row, g.swept[key]) for g, row in finished if key in g.swept]
        if key == SEED or not points:
            continue
        values = list(dict.fromkeys(value for *_, value in points))
        layout = figures.layout("held-out reward", figures.label(short(key)), height=270)
        layout |= {"hovermode": "closest", "showlegend": False}
        at, axis = _positions(values)
        layout["xaxis"] |= axis
        traces = [
            {
                "type": "scatter",
                "mode": "markers",
                "name": figures.label(group.name),
                "x": [at[value] for g, _, value in points if g is group],
                "y": [figures.compact(row.mean[1]) for g, row, _ in points if g is group],
                "meta": figures.PAGE,
                "customdata": [report_of(row) or None for g, row, _ in points if g is group],
                "marker": {"color": colour[group.name], "size": 9, "opacity": 0.85},
            }
            for group in groups
            if any(g is group for g, *_ in points)
        ]
        charts.append(Chart(short(key), {"": {"data": traces, "layout": layout}}))
    return charts


def report_of(row: Row) -> str:
    """Returns where the sweep's page finds the report of a job's run; "" if there is none yet."""
    return f"{row.job.num}/{FILE}" if (row.job.run.path / FILE).exists() else ""


def _series(row: Row, env: str, held_out: bool) -> dict[int, float]:
    """Returns the run's reward in one environment as `{step: reward}`."""
    series = {}
    for entry in row.job.run.metrics:
        rewards = of_each_env(entry, "reward", held_out)
        if env in rewards:
            series[entry["step"]] = rewards[env]
    return series


def _mean_and_spread(
    name: str, seeds: Sequence[Mapping[int, float]], colour: str, held_out: bool
) -> list[dict[str, Any]]:
    """Returns the traces of the mean over seeds, and of ± their sample standard deviation as a band."""
    steps = sorted({step for series in seeds for step in series})
    values = [[series[step] for series in seeds if step in series] for step in steps]
    means = [fmean(rewards) for rewards in values]
    spread = [stdev(rewards) if len(rewards) > 1 else 0.0 for rewards in values]
    if not steps:
        return []
    traces: list[dict[str, Any]] = []
    if any(spread):
        at, lows, _, _ = figures.bucketed(steps, [m - s for m, s in zip(means, spread, strict=True)])
        highs = figures.bucketed(steps, [m + s for m, s in zip(means, spread, strict=True)])[3]
        traces += figures.band(at, lows, highs, colour, name)
    if held_out:
        return traces + figures.points(name, steps, means, colour)
    return traces + figures.line(name, steps, means, colour)


def _positions(values: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns each value's position on the x axis, and the axis: numbers keep their value, on a logarithmic
    axis if they span a decade or more, and other values stand side by side."""
    try:
        at = {value: float(value) for value in values}
    except ValueError:
        return {value: figures.label(value) for value in values}, {"type": "category"}
    numbers = at.values()
    is_log = min(numbers) > 0 and max(numbers) >= 10 * min(numbers)
    axis: dict[str, Any] = {"type": "log" if is_log else "linear"}
    if len(at) <= 5:
        axis |= {"tickmode": "array", "tickvals": list(numbers), "ticktext": list(map(figures.label, at))}
    return dict(at), axis
