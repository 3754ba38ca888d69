"""Figures are what plotly.js reads: plotly's own Python accepts them. A long series keeps its extremes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run

from gymexp.report import figures
from gymexp.report.page import PANELS
from gymexp.report.run_records import read_records

PAGE_STYLE = Path(figures.__file__).with_name("page.css").read_text()


def in_colour(value: Any) -> Any:
    """A figure with colours in place of CSS variables, each of which page.css must have."""
    if isinstance(value, str) and value.startswith("--"):
        name, _, opacity = value.partition("@")
        assert len(re.findall(rf"{name}: #[0-9a-f]{{6}};", PAGE_STYLE)) == 2, f"{name} for light and dark"
        return f"rgba(1,2,3,{opacity or 1})"
    if isinstance(value, dict):
        return {key: in_colour(one) for key, one in value.items()}
    return [in_colour(one) for one in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def charts(tmp_path_factory):
    records = read_records(make_run(tmp_path_factory.mktemp("runs") / "run"))
    return [chart for build in PANELS for chart in build(records).charts]


def test_plotlys_own_python_accepts_every_figure(charts):
    from plotly.graph_objects import Figure

    assert len(charts) > 25
    for chart in charts:
        for figure in chart.figures.values():
            Figure(**in_colour(figure))


def test_a_chart_has_a_choice_of_the_last_few_steps_alone(charts):
    [gantt] = [chart for chart in charts if len(chart.figures) > 1]
    assert list(gantt.figures) == ["step 30", "step 29", "step 28", "step 27"]


def test_a_long_series_is_shown_as_buckets_with_minimum_mean_and_maximum():
    values = [0.0] * 3_000
    values[1_000], values[2_000] = 9.0, -9.0
    steps, lows, means, highs = figures.bucketed(range(1, 3_001), values)
    assert len(steps) <= 500 and max(highs) == 9.0 and min(lows) == -9.0
    assert sum(mean * 6 for mean in means) == pytest.approx(0)
    assert figures.bucketed(range(3), [1.0, None, 2.0])[1:] == ([1.0, None, 2.0],) * 3


def test_a_bucket_without_a_value_has_none():
    _, lows, means, highs = figures.bucketed(range(2_500), [None] * 2_500)
    assert set(lows) == set(means) == set(highs) == {None}
    assert figures.line("x", range(2_500), [None] * 2_500, "--c1") == []


def test_even_steps_are_kept_as_first_and_distance():
    [trace] = figures.line("x", [2, 4, 6], [1.0, 2.0, 3.0], "--c1")
    assert (trace["x0"], trace["dx"]) == (2, 2) and "x" not in trace
    [trace] = figures.line("x", [2, 4, 7], [1.0, 2.0, 3.0], "--c1")
    assert trace["x"] == [2, 4, 7]


def test_a_name_is_shown_literally():
    assert figures.label("<a href='x'>&\x1b") == "&lt;a href='x'&gt;&amp;\\x1b"
    assert len(figures.label("x" * 100)) == 48


@pytest.mark.parametrize(
    ("value", "shown"), [(1.23456, 1.235), (float("nan"), None), (float("inf"), None), (2.0, 2)]
)
def test_numbers_have_four_digits_and_are_finite(value, shown):
    assert figures.compact(value) == shown
