"""Writes the viewer's pages for some rollouts to a folder, which a browser opens without a server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gymexp.errors import GymexpError, RunDirectoryError
from gymexp.view import tables
from gymexp.view.links import export_link
from gymexp.view.pages import ALL
from gymexp.view.server import ASSETS
from gymexp.view.site import Site
from gymexp.view.viewed_run import ViewedRun

LIMIT = 500  # rollouts, unless the user says another number: about 90 kB each
_FOLDER = "static"
_LISTS = ("steps", "step", "tasks", "rollouts")
_OF_A_ROLLOUT = ("rollout", "tokens", "task", "verdict", "raw")


def export(
    runs: Mapping[str, ViewedRun], to: Path, steps: str | None, env: str | None, limit: int | None
) -> str:
    """Writes the pages of one run to the new folder `to`, and returns what was written and left out.

    steps: "30:40", the first and the last step; either may be empty. env: one environment alone. limit: the
    most rollouts, LIMIT if None: whole groups, the newest steps first. Raises GymexpError if the selection is
    empty, or the folder has files.
    """
    if len(runs) != 1:
        raise GymexpError(f"--export takes the directory of one run, got {len(runs)} runs")
    if to.exists() and any(to.iterdir()):
        raise GymexpError(f"--export must name a new or an empty folder, but {to} has files")
    [run] = runs.values()
    run.refresh()
    if run.index.error:
        raise RunDirectoryError(run.index.error)
    first, last = _range(steps)
    num_all = run.index.query("SELECT COUNT(*) AS num FROM rollouts")[0]["num"]
    most = LIMIT if limit is None else limit
    groups = _groups(run, first, last, env)
    if not groups:
        raise GymexpError(
            f"no rollout is exported: of {num_all}, none is of --steps {steps or ':'}, --env {env or 'any'}"
        )
    if most < (needed := groups[0]["num"]):
        raise GymexpError(f"--limit must be {needed} or more, as groups are exported whole, got {most}")
    num = run.index.keep(_within(groups, most))
    chosen = [f"steps {steps}"] if steps else []
    chosen += [f"environment {env}"] if env else []
    chosen += [f"at most {most}, the newest first"]
    left_out = (
        f"An export of {num} of {num_all} rollouts ({', '.join(chosen)}). The other {num_all - num}, logs, "
        "comparisons and texts beyond 20 kB are left out; charts are of the whole run."
    )
    to.mkdir(parents=True, exist_ok=True)
    _write_pages(run, to, left_out)
    (to / _FOLDER).mkdir()
    for name, path in ASSETS.items():
        shutil.copyfile(path, to / _FOLDER / name)
    return f"wrote {to / 'index.html'}: {left_out}"


def _range(steps: str | None) -> tuple[int, int]:
    if steps is None:
        return 0, 1 << 60
    match = re.fullmatch(r"(\d{0,9}):(\d{0,9})", steps)
    if match is None:
        raise GymexpError(f"--steps must be A:B, the first and the last step, got {steps!r}: say e.g. 30:40")
    return int(match[1] or 0), int(match[2] or 1 << 60)


def _groups(run: ViewedRun, first: int, last: int, env: str | None) -> list[dict[str, Any]]:
    """Returns the selected groups, the newest steps first."""
    return run.index.query(
        "SELECT file, grp, COUNT(*) AS num FROM rollouts WHERE step BETWEEN ? AND ? "
        "AND (? IS NULL OR env = ?) GROUP BY file, grp ORDER BY step DESC, file DESC, grp",
        (first, last, env, env),
    )


def _within(groups: Sequence[Mapping[str, Any]], most: int) -> list[tuple[str, int]]:
    """Returns (file, group) of the first groups that have at most `most` rollouts together."""
    chosen, num = [], 0
    for group in groups:
        if num + group["num"] > most:
            break
        num += group["num"]
        chosen.append((group["file"], group["grp"]))
    return chosen


def _write_pages(run: ViewedRun, to: Path, left_out: str) -> None:
    site = Site(
        {run.slug: run}, lambda _: export_link, lambda name: f"{_FOLDER}/{name}", "index.html", left_out
    )
    for page, place in _pages(run):
        try:
            text = site.render(run, page, place, {"page": ALL} if page in _LISTS else {})
        except RunDirectoryError as error:
            text = site.problem("The run directory does not have it", str(error))
        (to / export_link(page, **place)).write_text(text, encoding="utf-8", errors="backslashreplace")


def _pages(run: ViewedRun) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (page, place) of each page of the export."""
    for page in ("run", "steps", "tasks", "rollouts", "config"):
        yield page, {}
    for file in tables.files_of(run.index):
        yield "step", {"file": file}
    for row in run.index.query("SELECT DISTINCT file, grp FROM rollouts"):
        yield "group", {"file": row["file"], "group": str(row["grp"])}
    for row in run.index.query("SELECT file, number FROM rollouts"):
        for page in _OF_A_ROLLOUT:
            yield page, {"file": row["file"], "number": str(row["number"])}
