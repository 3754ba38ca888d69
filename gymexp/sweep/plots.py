"""A sweep's plots as SVG for its page: text and axes in the page's colour, each configuration in its own."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from gymexp.record.metric_names import of_each_env
from gymexp.sweep.table import SEED, Group, Row, short

_INK = "#0a0b0c"  # a colour that nothing else has, so that `_svg` can replace it by the page's text colour
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
_STYLE: dict[Any, Any] = dict.fromkeys(_INKED, _INK) | {
    "svg.fonttype": "none",
    "svg.hashsalt": "gymexp",  # makes the same file from the same numbers
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.2,
    "lines.linewidth": 1.8,
}


def colours(groups: Sequence[Group]) -> dict[str, str]:
    """Returns a colour for each configuration, by its name: distinct ones for up to 10 configurations, else
    colours along a scale."""
    few = len(groups) <= 10
    scale = colormaps["tab10" if few else "turbo"]
    positions = [i if few else 0.08 + 0.84 * i / (len(groups) - 1) for i in range(len(groups))]
    return {group.name: to_hex(scale(at)) for group, at in zip(groups, positions, strict=True)}


def curves(env: str, groups: Sequence[Group], colour: Mapping[str, str]) -> str:
    """Returns an SVG of the held-out and the training reward of one environment over steps: the mean over
    seeds, ± their sample standard deviation."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11.6, 3.4), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for ax, held_out in zip(axes, (True, False), strict=True):
            for group in groups:
                _band(ax, [_series(row, env, held_out) for row in group.rows], colour[group.name], held_out)
            ax.set(title=f"{env}: {'held-out' if held_out else 'training'} reward", xlabel="step")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(True)
        return _svg(figure)


def finals(groups: Sequence[Group], keys: Sequence[str], colour: Mapping[str, str]) -> str:
    """Returns an SVG of each finished run's held-out reward after training (mean over the environments)
    against each swept key. Returns an empty text if no run has finished, or only seeds are swept."""
    keys = [key for key in keys if key != SEED]
    finished = [(g, row) for g in groups for row in g.finished if row.mean[1] is not None]
    if not keys or not finished:
        return ""
    num_columns = min(len(keys), 3)
    num_rows = math.ceil(len(keys) / num_columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.9 * num_columns, 3.0 * num_rows), layout="constrained")
        axes = list(figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).flat)
        for ax, key in zip(axes, keys, strict=False):
            points = [(g, row, g.swept[key]) for g, row in finished if key in g.swept]
            at = _positions(ax, list(dict.fromkeys(value for *_, value in points)))
            for group, row, value in points:
                ax.plot(at[value], row.mean[1], "o", color=colour[group.name], alpha=0.85, markersize=6)
            ax.set(ylabel="held-out reward" if ax is axes[0] else "", xlabel=short(key))
            ax.grid(True)
        for ax in axes[len(keys) :]:
            ax.set_visible(False)
        return _svg(figure)


def _series(row: Row, env: str, held_out: bool) -> dict[int, float]:
    """Returns the run's reward in one environment as `{step: reward}`."""
    series = {}
    for entry in row.job.run.metrics:
        rewards = of_each_env(entry, "reward", held_out)
        if env in rewards:
            series[entry["step"]] = rewards[env]
    return series


def _band(ax: Axes, seeds: Sequence[Mapping[int, float]], colour: str, held_out: bool) -> None:
    """Draw the mean over seeds as a line, and ± their sample standard deviation as a band."""
    steps = sorted({step for series in seeds for step in series})
    values = [[series[step] for series in seeds if step in series] for step in steps]
    means = [fmean(rewards) for rewards in values]
    spread = [stdev(rewards) if len(rewards) > 1 else 0.0 for rewards in values]
    ax.plot(steps, means, color=colour, marker="o" if held_out else None, markersize=3.5)
    if any(spread):
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _positions(ax: Axes, values: Sequence[str]) -> dict[str, float]:
    """Returns each value's position on the x axis, and sets the axis up: numbers keep their value, on a
    logarithmic axis if they span a decade or more, and other values stand side by side."""
    try:
        at = {value: float(value) for value in values}
    except ValueError:
        at = {value: float(i) for i, value in enumerate(values)}
        ax.set_xticks(list(at.values()), list(at), rotation=20 if max(map(len, values)) > 12 else 0)
        ax.margins(x=0.3)
        return at
    numbers = at.values()
    if min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
        ax.set_xscale("log")
    if len(at) <= 5:
        ax.set_xticks(list(numbers), list(at))
        ax.minorticks_off()
    ax.margins(x=0.15)
    return at


def _svg(figure: Figure) -> str:
    """Returns the figure as an `<svg>` element whose text has the page's colour."""
    out = io.StringIO()
    no_metadata: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=no_metadata)
    svg = out.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
