"""Panels of charts, and the report's findings, as the pages show them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from gymexp.report.findings import Finding
from gymexp.report.page import findings_of, guard_ids, in_script, panels_of, plotly_script
from gymexp.report.panel import Figure, Panel
from gymexp.report.run_records import RunReader
from gymexp.view.tables import files_of
from gymexp.view.viewed_run import ViewedRun


@dataclass(frozen=True)
class Charts:
    """findings, panels: of the report. numbers: of each figure by its identity, its place in `figures`.
    figures: as JSON that may stand in a page. guard_ids: of elements that keep plotly from styling.
    files: the names of the steps and evaluations that have a page."""

    findings: Sequence[Finding]
    panels: Sequence[Panel]
    numbers: dict[int, int]
    figures: Markup
    guard_ids: Sequence[str]
    files: Sequence[str]

    def number_of(self, figure: Figure) -> int:
        """Returns the place of a figure in `figures`."""
        return self.numbers[id(figure)]


class ChartCache:
    """Makes the charts of a run, and makes them anew once the run has changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers: dict[str, RunReader] = {}
        self._made: dict[str, tuple[int, Charts]] = {}

    def charts_of(self, run: ViewedRun) -> Charts:
        """Returns the charts of this moment. Raises RunDirectoryError if a file leads out of the run."""
        run.check()
        with self._lock:
            made = self._made.get(run.slug)
            if made is None or made[0] != run.version:
                reader = self._readers.setdefault(run.slug, RunReader(run.path, is_own=False))
                version = run.version
                self._made[run.slug] = made = version, _build(reader, files_of(run.index))
            return made[1]


def _build(reader: RunReader, files: Sequence[str]) -> Charts:
    records = reader.read()
    return charts_of_panels(panels_of(records), findings_of(records), files)


def charts_of_panels(
    panels: Sequence[Panel], findings: Sequence[Finding] = (), files: Sequence[str] = ()
) -> Charts:
    """Returns panels as a page's template needs them. files: of `Charts`."""
    figures: list[Figure] = []
    numbers: dict[int, int] = {}
    for figure in (f for panel in panels for chart in panel.charts for f in chart.figures.values()):
        numbers[id(figure)] = len(figures)
        figures.append(figure)
    return Charts(findings, panels, numbers, Markup(in_script(figures)), guard_ids(plotly_script()), files)
