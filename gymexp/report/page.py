"""Makes report.html: one file that needs nothing else, whose policy lets only its own scripts run."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from gymexp.config.redaction import without_secrets
from gymexp.files import replace_file
from gymexp.printable import duration, printable, printable_in
from gymexp.record.run_state import wall_seconds
from gymexp.report import (
    evaluation_panels,
    hacking_panel,
    learning_panels,
    policy_panels,
    rollout_panels,
    run_panels,
    time_panels,
)
from gymexp.report.evaluation_panels import find_in_evaluation
from gymexp.report.findings import MAX_FINDINGS, Finding, find
from gymexp.report.panel import Figure, Panel
from gymexp.report.run_records import RunRecords, read_records

FILE = "report.html"
RELOAD_S = 60
_HERE = Path(__file__).parent
PANELS: Sequence[Callable[[RunRecords], Panel]] = (
    learning_panels.held_out_panel,
    learning_panels.reward_panel,
    learning_panels.success_panel,
    learning_panels.pass_panel,
    learning_panels.groups_panel,
    policy_panels.entropy_panel,
    policy_panels.kl_panel,
    policy_panels.ratio_panel,
    policy_panels.clip_panel,
    policy_panels.loss_panel,
    policy_panels.advantage_panel,
    rollout_panels.length_panel,
    rollout_panels.ending_panel,
    rollout_panels.tool_panel,
    time_panels.seconds_panel,
    time_panels.gantt_panel,
    time_panels.rate_panel,
    time_panels.machine_panel,
    rollout_panels.task_panel,
    hacking_panel.hacking_panel,
    run_panels.event_panel,
    run_panels.config_panel,
    run_panels.version_panel,
)
EVALUATION_PANELS: Sequence[Callable[[RunRecords], Panel]] = (
    evaluation_panels.results_panel,
    evaluation_panels.samples_panel,
    evaluation_panels.endings_panel,
    rollout_panels.task_panel,
    hacking_panel.hacking_panel,
    time_panels.machine_panel,
    run_panels.event_panel,
    run_panels.config_panel,
    run_panels.version_panel,
)


def write_report(path: Path) -> Path:
    """Writes report.html into a run directory, or an evaluation's, and returns its path. Raises
    RunDirectoryError if the directory is neither."""
    report = path / FILE
    replace_file(report, run_page(read_records(path)))
    return report


def panels_of(records: RunRecords) -> list[Panel]:
    """Returns the panels of a run, or of an evaluation."""
    return [build(records) for build in (EVALUATION_PANELS if records.is_evaluation else PANELS)]


def findings_of(records: RunRecords) -> list[Finding]:
    """Returns the findings of a run, or of an evaluation."""
    return (find_in_evaluation if records.is_evaluation else find)(records)[:MAX_FINDINGS]


def run_page(records: RunRecords) -> str:
    """Returns the page of a run, or of an evaluation."""
    run = records.run
    last = run.status.get("max_steps")
    done = f"step {run.step}/{last}" if last else f"step {run.step}" if run.step else ""
    facts = ["evaluation" if records.is_evaluation else done]
    facts += [duration(wall_seconds(run)) if records.events else "", *_time_left(records)]
    facts += [", ".join(records.envs), str(records.setting("model.name", ""))]
    facts += [
        f"commit {records.commit[:8]}{' with changes' if records.is_dirty else ''}" if records.commit else ""
    ]
    return page(
        title=f"{path_name(records.path)}",
        state=run.state,
        why=without_secrets(run.why),
        facts=[fact for fact in facts if fact],
        findings=findings_of(records),
        panels=panels_of(records),
        reload_s=RELOAD_S if run.state in ("running", "waiting") else None,
    )


def path_name(path: Path) -> str:
    """Returns the last two parts of a run directory's path, which tell runs apart."""
    return " / ".join(path.absolute().parts[-2:])


def _time_left(records: RunRecords) -> list[str]:
    last, step = records.run.status.get("max_steps"), records.run.step
    seconds = [value for value in records.series("time/step")[-20:] if value]
    if records.run.state != "running" or not last or not seconds or step >= last:
        return []
    return [f"about {duration((last - step) * sum(seconds) / len(seconds))} left"]


def page(
    title: str,
    state: str,
    why: str,
    facts: Sequence[str],
    findings: Sequence[Finding],
    panels: Sequence[Panel],
    reload_s: int | None,
) -> str:
    """Returns a page of panels. Everything but this package's own script and style is escaped.

    state: shown as a chip. facts: shown beside it. reload_s: seconds after which the page reloads itself;
    None: never.
    """
    figures: list[Figure] = []
    numbers: dict[int, int] = {}
    for panel in panels:
        for chart in panel.charts:
            for figure in chart.figures.values():
                numbers[id(figure)] = len(figures)
                figures.append(figure)
    plotly = plotly_script() if figures else ""
    script, style = _own("charts.js"), _own("page.css")
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            title=printable(title),
            state=state,
            why=printable(why),
            facts=printable_in(list(facts)),
            findings=findings,
            panels=panels,
            number_of=lambda figure: numbers[id(figure)],
            reload_s=reload_s,
            made=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            figures=in_script(figures),
            policy=content_policy([script, plotly] if plotly else [script], [style, ""]),
            plotly=plotly,
            script=script,
            style=style,
            guard_ids=guard_ids(plotly),
        )
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    return environment


@cache
def _own(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@cache
def plotly_script() -> str:
    """Returns plotly.js as the installed package has it, without importing the package.

    Nothing in it may end the element that it stands in.
    """
    spec = importlib.util.find_spec("plotly")
    assert spec is not None and spec.submodule_search_locations, "plotly is a dependency"
    [package] = spec.submodule_search_locations
    text = (Path(package) / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    assert not re.search(r"</script|<!--", text, re.IGNORECASE), "plotly.min.js cannot stand in a page"
    return text


def guard_ids(script: str) -> list[str]:
    """Returns the ids that plotly.js looks for before it adds the style of its maps, which the page's policy
    refuses and no chart here needs. An element with such an id keeps it from trying."""
    return re.findall(r'getElementById\("([0-9a-f]{64})"\)', script)


def content_policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """Returns a page's Content-Security-Policy: its own scripts and styles by their hashes, and nothing else.

    styles: with the empty text, as plotly.js makes an empty style element and adds its rules by script.
    """
    own = " ".join(map(source_hash, scripts)) or "'none'"
    return (
        f"default-src 'none'; script-src {own}; style-src {' '.join(map(source_hash, styles))}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def source_hash(text: str) -> str:
    """Returns the hash of an inline script or style, as a policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def in_script(value: Any) -> str:
    """Returns JSON that may stand inside a script element: nothing in it ends or comments the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
