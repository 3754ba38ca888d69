"""What a page shows: panels of charts and tables, as plain data that a template or a server can render."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# A figure of plotly.js: {"data": […], "layout": {…}}. charts.js resolves its colours: CSS variables.
Figure = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """One chart. figures: by label what a reader can choose from, the first is shown; one without a choice.
    axis: charts of the same axis zoom together; "" for a chart alone."""

    title: str
    figures: dict[str, Figure]
    axis: str = ""


@dataclass(frozen=True)
class Table:
    """A table of texts. numeric: the columns that are aligned to the right. dots: a colour for each row, as
    in a chart; links: where the first cell of each row leads, "" to nowhere."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    dots: Sequence[str] = ()
    links: Sequence[str] = ()


@dataclass(frozen=True)
class Panel:
    """One panel of a page. id: its anchor. about: how to read it. notes: what is missing from it, and why; a
    panel without charts, tables and texts has at least one. texts: folded texts by title."""

    id: str
    title: str
    about: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    texts: dict[str, str] = field(default_factory=dict)
    wide: bool = False  # takes the page's whole width

    @property
    def is_empty(self) -> bool:
        """Whether it has nothing to show but its notes."""
        return not (self.charts or self.tables or self.texts)
