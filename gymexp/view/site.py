"""The pages of the viewer by name, rendered: what the server answers with and the export writes."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gymexp.errors import GymexpError
from gymexp.printable import csv_cell
from gymexp.view import pages, rollout_pages
from gymexp.view.charts_page import ChartCache
from gymexp.view.compare_page import compare_page
from gymexp.view.filters import selection
from gymexp.view.links import Link, with_changes
from gymexp.view.rendering import build_environment
from gymexp.view.rollout_pages import side_by_side, side_of
from gymexp.view.viewed_run import ViewedRun

Page = Callable[[ViewedRun, Mapping[str, str], Mapping[str, str]], dict[str, Any]]
_PAGES: dict[str, tuple[Page, str]] = {
    "run": (pages.run_page, "run.html"),
    "steps": (pages.steps_page, "steps.html"),
    "step": (pages.step_page, "step.html"),
    "group": (pages.group_page, "group.html"),
    "tasks": (pages.tasks_page, "tasks.html"),
    "rollouts": (pages.rollouts_page, "rollouts.html"),
    "rollout": (rollout_pages.rollout_page, "rollout.html"),
    "tokens": (rollout_pages.tokens_page, "tokens.html"),
    "task": (rollout_pages.task_page, "json.html"),
    "verdict": (rollout_pages.verdict_page, "json.html"),
    "raw": (rollout_pages.raw_page, "json.html"),
    "text": (rollout_pages.text_page, "text.html"),
    "config": (pages.config_page, "config.html"),
    "logs": (pages.logs_page, "logs.html"),
    "log": (pages.log_page, "log.html"),
}
_CSV = (
    "file", "number", "grp", "idx", "key", "env", "split", "step", "outcome", "why", "reward", "success",
    "advantage", "turns", "tokens", "trained", "prompt_tokens", "nll", "ratio_max", "tool_calls",
    "tool_errors", "began", "total_s", "policy_s", "queue_s", "seed", "replica", "weights_version", "retries",
    "text",
)  # fmt: skip


@dataclass
class Site:
    """The viewed runs and how their pages are rendered.

    link: of a run, by page. asset: of a file of the look. home: the address of the first page.
    left_out: what an export says of the rollouts that it lacks; "" for a server."""

    runs: dict[str, ViewedRun]
    link: Callable[[ViewedRun], Link]
    asset: Callable[[str], str]
    home: str
    left_out: str = ""
    charts: ChartCache = field(default_factory=ChartCache, repr=False)
    _templates: Any = field(default_factory=build_environment, repr=False)

    def render(
        self, run: ViewedRun, page: str, place: Mapping[str, str], arguments: Mapping[str, str]
    ) -> str:
        """Returns a page as HTML. Raises BadAddress if there is none, RunDirectoryError if a file is gone."""
        with run.search.resting():
            return self._render(run, page, place, arguments)

    def _render(
        self, run: ViewedRun, page: str, place: Mapping[str, str], arguments: Mapping[str, str]
    ) -> str:
        if page == "compare":
            return self._html("compare.html", run, page, arguments, compare_page(self.runs, run, arguments))
        if page == "side":
            other = self.runs.get(arguments.get("with") or run.slug, run)
            context = rollout_pages.side_page(run, place, arguments, other)
            return self._html("side.html", run, page, arguments, context)
        make, template = _PAGES[page]
        context = make(run, place, arguments)
        if page == "group":
            two = [
                side_of(run, row, run.files.read_record(row)) for row in (context["left"], context["right"])
            ]
            context |= side_by_side(*two)
        if page == "run":
            context["report"] = self.charts.charts_of(run)
        return self._html(template, run, page, arguments, context)

    def prepare(self) -> None:
        """Reads the first run and makes its charts, so that its page need not wait for them."""
        run = next(iter(self.runs.values()))
        with contextlib.suppress(GymexpError):  # its page says what is wrong
            run.refresh()
            self.charts.charts_of(run)

    def front(self) -> str:
        """Returns the page that lists several runs."""
        rows = [(run, run.state()) for run in self.runs.values()]
        return self._templates.get_template("front.html").render(
            rows=rows, asset=self.asset, link_of=self.link, left_out=self.left_out, home=self.home
        )

    def problem(self, title: str, text: str) -> str:
        """Returns a page that says what is wrong."""
        return self._templates.get_template("problem.html").render(
            title=title, text=text, asset=self.asset, home=self.home
        )

    def _html(
        self,
        template: str,
        run: ViewedRun,
        page: str,
        arguments: Mapping[str, str],
        context: Mapping[str, Any],
    ) -> str:
        return self._templates.get_template(template).render(
            run=run,
            page_name=page,
            arguments=dict(arguments),
            link=self.link(run),
            link_of=self.link,
            asset=self.asset,
            home=self.home,
            many=len(self.runs) > 1,
            is_export=bool(self.left_out),
            left_out=self.left_out,
            changed=with_changes,
            **context,
        )


def is_searched(run: ViewedRun, arguments: Mapping[str, str]) -> bool:
    """Goes on with the search for a URL's text for about a second; returns whether it has ended."""
    found = run.search.find(selection(arguments), 1.0)
    return found is None or found.is_done


def as_csv(run: ViewedRun, arguments: Mapping[str, str]) -> str:
    """Returns the rollouts that a URL selects as CSV. A cell that a spreadsheet would take for a formula gets
    a leading apostrophe."""
    chosen = selection(arguments)
    rows = run.index.query(
        f"SELECT * FROM rollouts WHERE {chosen.where} ORDER BY {chosen.order}", chosen.parameters
    )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(_CSV)
    writer.writerows([csv_cell(row[name]) for name in _CSV] for row in rows)
    return out.getvalue()
