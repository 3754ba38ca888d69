"""Builds the figures of a page as plain dicts, in the form that plotly.js reads. Pure functions.

plotly's Python package is not imported: it takes a second. Text of a run (an environment's name) passes
through `label`, because plotly.js reads a few HTML tags in the texts of a chart.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gymexp.printable import printable
from gymexp.report.panel import Chart

Number = int | float
Values = Sequence[Number | None]
MAX_POINTS = 2_000  # of a series; a longer one is shown as buckets
_NUM_BUCKETS = 500
_MAX_LABEL = 48  # characters
_COLOURS = tuple(f"--c{number}" for number in range(1, 11))
STEP_AXIS = "step"
PAGE = "page"  # the meta of a trace whose customdata are the addresses to which a click leads
EVALUATION = "eval"  # the meta of a trace whose x are the steps of evaluations, to which a click leads


# A map of shares of solved rollouts. Half solved must not look like a cell without a rollout.
SOLVED: dict[str, Any] = {
    "type": "heatmap",
    "zmin": 0,
    "zmax": 1,
    "colorscale": [[0, "--low"], [0.5, "--line"], [1, "--high"]],
    "colorbar": {
        "thickness": 10,
        "title": {"text": "solved", "side": "right"},
        "outlinewidth": 0,
        "len": 1,
    },
}


def label(text: object) -> str:
    """Returns a text as plotly.js shows it literally, shortened to 48 characters."""
    shown = printable(str(text)).replace("\n", " ")
    shown = shown if len(shown) <= _MAX_LABEL else f"{shown[: _MAX_LABEL - 1]}…"
    return html.escape(shown, quote=False)


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each name, in their order; after ten they repeat."""
    return {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}


def compact(value: Number | None) -> Number | None:
    """Returns a number with four significant digits, for a small page; None for what JSON does not have."""
    if value is None or not math.isfinite(value):
        return None
    if isinstance(value, int) or value == int(value):
        return int(value)
    return float(f"{value:.4g}")


def bucketed(steps: Sequence[int], values: Values) -> tuple[list[int], Values, Values, Values]:
    """Returns (steps, minima, means, maxima) of at most 500 buckets of neighbouring steps.

    A series of at most 2,000 points stays as it is, with equal minima, means and maxima. A bucket without a
    value has None.
    """
    if len(steps) <= MAX_POINTS:
        return list(steps), values, values, values
    size = math.ceil(len(steps) / _NUM_BUCKETS)
    middles: list[int] = []
    lows: list[Number | None] = []
    means: list[Number | None] = []
    highs: list[Number | None] = []
    for start in range(0, len(steps), size):
        measured = [v for v in values[start : start + size] if v is not None and math.isfinite(v)]
        here = steps[start : start + size]
        middles.append(here[len(here) // 2])
        lows.append(min(measured, default=None))
        means.append(sum(measured) / len(measured) if measured else None)
        highs.append(max(measured, default=None))
    return middles, lows, means, highs


def line(
    name: str, steps: Sequence[int], values: Values, colour: str, *, faint: bool = False, dash: str = "solid"
) -> list[dict[str, Any]]:
    """Returns the traces of one series over steps: a line; for more than 2,000 steps the means of buckets,
    with a band from minimum to maximum. faint: thin and behind others. Empty without any value."""
    if all(value is None for value in values):
        return []
    steps, lows, means, highs = bucketed(steps, values)
    few = sum(value is not None for value in means) < 30
    trace = {
        "type": "scatter",
        "mode": "lines+markers" if few and not faint else "lines",
        "name": label(name),
        **_x(steps),
        "y": [compact(value) for value in means],
        "line": {"color": f"{colour}@0.45" if faint else colour, "width": 1 if faint else 2, "dash": dash},
        "marker": {"size": 5},
        "connectgaps": True,
        "legendgroup": label(name),
    }
    ranges = band(steps, lows, highs, colour, name) if lows is not means else []
    return [*ranges, trace]


def band(steps: Sequence[int], lows: Values, highs: Values, colour: str, group: str) -> list[dict[str, Any]]:
    """Returns the traces of an area between two series, drawn where both have a value. group: the name of the
    series that it is hidden with."""
    here = [
        i
        for i, (low, high) in enumerate(zip(lows, highs, strict=True))
        if low is not None and high is not None
    ]
    if not here:
        return []
    at, lows, highs, _ = [steps[i] for i in here], [lows[i] for i in here], [highs[i] for i in here], None
    outer: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines",
        **_x(at),
        "line": {"width": 0, "color": f"{colour}@0.15"},
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": label(group),
    }
    upper = outer | {"name": f"{label(group)}, high", "y": [compact(value) for value in highs]}
    lower = outer | {
        "name": f"{label(group)}, low",
        "y": [compact(value) for value in lows],
        "fill": "tonexty",
        "fillcolor": f"{colour}@0.15",
    }
    return [upper, lower]


def points(
    name: str, steps: Sequence[int], values: Values, colour: str, errors: Sequence[tuple[Number, Number]] = ()
) -> list[dict[str, Any]]:
    """Returns the trace of a few measured points, joined by a line. errors: how far each interval reaches
    below and above its point."""
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label(name),
        "x": list(steps),
        "y": [compact(value) for value in values],
        "line": {"color": colour, "width": 2},
        "marker": {"size": 8, "color": colour},
    }
    if errors:
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "arrayminus": [compact(low) for low, _ in errors],
            "array": [compact(high) for _, high in errors],
            "color": colour,
            "thickness": 1.5,
            "width": 5,
        }
    return [trace]


def stack(
    steps: Sequence[int], parts: Mapping[str, Values], colours: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Returns the traces of series that are stacked on each other, without those that are 0 throughout."""
    traces: list[dict[str, Any]] = []
    for name, values in parts.items():
        if any(values):
            at, _, means, _ = bucketed(steps, [value or 0 for value in values])
            traces.append(
                {
                    "type": "scatter" if len(at) > 60 else "bar",
                    "name": label(name),
                    **_x(at),
                    "y": [compact(value) for value in means],
                    "marker": {"color": colours[name], "line": {"width": 0}},
                }
            )
            if traces[-1]["type"] == "scatter":
                traces[-1] |= {"mode": "lines", "stackgroup": "all", "fillcolor": f"{colours[name]}@0.75"}
                traces[-1] |= {"line": {"width": 0.5, "color": colours[name]}}
    return traces


def _x(steps: Sequence[int]) -> dict[str, Any]:
    """Returns the steps of a trace: as first and distance where they are even, which keeps a page small."""
    if len(steps) > 2 and all(b - a == steps[1] - steps[0] for a, b in itertools.pairwise(steps)):
        return {"x0": steps[0], "dx": steps[1] - steps[0]}
    return {"x": list(steps)}


def over_steps(
    title: str,
    traces: Sequence[dict[str, Any]],
    y: str = "",
    *,
    log: bool = False,
    height: int = 250,
    **axis: Any,
) -> list[Chart]:
    """Returns a chart over optimizer steps; no chart without traces. y: what the axis shows, with its unit.
    axis: further properties of the y axis."""
    if not traces:
        return []
    figure = {"data": list(traces), "layout": layout(y, "optimizer step", height=height)}
    figure["layout"]["barmode"] = "stack"
    figure["layout"]["yaxis"] |= axis | ({"type": "log"} if log else {})
    return [Chart(title, {"": figure}, STEP_AXIS)]


def threshold(value: Number, text: str) -> dict[str, Any]:
    """Returns the properties of a layout that draw a horizontal line with a text."""
    shape = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value}
    note = {"xref": "paper", "x": 1, "y": value, "xanchor": "right", "yanchor": "bottom", "showarrow": False}
    return {
        "shapes": [shape | {"line": {"color": "--c8", "width": 1, "dash": "dash"}}],
        "annotations": [note | {"text": label(text), "font": {"color": "--c8", "size": 11}}],
    }


def layout(y: str, x: str, height: int = 250) -> dict[str, Any]:
    """Returns the layout that all charts have in common. height: in pixels."""
    axis = {
        "gridcolor": "--line",
        "linecolor": "--line",
        "zeroline": False,
        "automargin": True,
        "tickfont": {"color": "--dim", "size": 11},
    }
    titled = {"font": {"color": "--dim", "size": 11}, "standoff": 6}
    return {
        "height": height,
        "margin": {"l": 46, "r": 10, "t": 8, "b": 36},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "--ink", "size": 12, "family": "system-ui, sans-serif"},
        "xaxis": axis | {"title": titled | {"text": x}},
        "yaxis": axis | {"title": titled | {"text": y}},
        "hovermode": "x unified",
        "hoverlabel": {
            "namelength": -1,
            "bgcolor": "--card",
            "bordercolor": "--line",
            "font": {"color": "--ink", "size": 12},
        },
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "font": {"size": 11},
            "bgcolor": "rgba(0,0,0,0)",
        },
        "showlegend": True,
        "bargap": 0.08,
    }
