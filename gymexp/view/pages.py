"""What the pages of the run, its steps, groups and tasks show: one function a page, without HTML or HTTP.

A page's function gets the run, its place in the URL and the URL's arguments, and returns the template's
values. The server and the export call the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gymexp.config.redaction import without_secrets
from gymexp.errors import RunDirectoryError
from gymexp.view import tables
from gymexp.view.charts_page import charts_of_panels
from gymexp.view.filters import PAGE, BadAddress, selection, sorting, whole_number
from gymexp.view.task_map import task_map
from gymexp.view.viewed_run import ViewedRun

Place = Mapping[str, str]
Arguments = Mapping[str, str]
Context = dict[str, Any]
_STEP_SORTS = ("group", "key", "mean", "spread", "change", "kind", "tokens", "seconds", "distinct")
_STEP_FILTERS = ("env", "outcome", "why", "min", "max", "text")
_TASK_SORTS = ("key", "kind", "visits", "solved", "best", "first", "last", "change")
_LOG_BYTES = 64_000
SEARCH_S = 0.7  # seconds that a page waits for a search before it shows how far it is
ALL = "all"  # the page of an export, which has no others


def run_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """The run: its state, held-out rewards, charts, newest steps."""
    state = run.state()
    steps = tables.step_rows(run.index, run.metrics)
    return {
        "state": state,
        "steps": steps[-12:][::-1],
        "num_rollouts": run.index.query("SELECT COUNT(*) AS num FROM rollouts")[0]["num"],
        "failed": causes(run),
        "envs": tables.environments(run.index),
    }


def causes(run: ViewedRun) -> list[dict[str, Any]]:
    """Returns how many rollouts were truncated, failed or refused, by environment and reason."""
    return run.index.query(
        "SELECT env, outcome, why, split, COUNT(*) AS num FROM rollouts WHERE why <> '' "
        "GROUP BY env, outcome, why, split ORDER BY num DESC LIMIT 20"
    )


def steps_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """A row a step and an evaluation."""
    split = arguments.get("split", "")
    rows = [row for row in tables.step_rows(run.index, run.metrics) if split in ("", row["split"])]
    page, rows, pages = paged(rows[::-1] if arguments.get("order") != "up" else rows, arguments)
    envs = tables.environments(run.index)
    return {"rows": rows, "envs": envs, "page": page, "pages": pages, "split": split, "kinds": tables.KINDS}


def paged(rows: list[Any], arguments: Arguments) -> tuple[int, list[Any], int]:
    """Returns (page from 1, its rows, number of pages). With the argument `page` "all": all rows."""
    if arguments.get("page") == ALL:
        return 1, rows, 1
    pages = max(1, -(-len(rows) // PAGE))
    page = min(max(1, whole_number(arguments, "page", 1)), pages)
    return page, rows[(page - 1) * PAGE : page * PAGE], pages


def step_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """The groups of a step or an evaluation."""
    file, names = place["file"], tables.files_of(run.index)
    if file not in names:
        raise BadAddress(f"the run has no rollouts of {file}")
    column, direction = sorting(arguments, dict.fromkeys(_STEP_SORTS), "group")
    wanted = {name: arguments.get(name, "") for name in _STEP_FILTERS}
    chosen = selection(wanted).within(file)
    search = run.search.find(chosen, SEARCH_S)
    here = run.index.query(f"SELECT DISTINCT grp FROM rollouts WHERE {chosen.where}", chosen.parameters)
    numbers = {row["grp"] for row in here}
    groups = [group for group in tables.group_rows(run.index, file) if group["group"] in numbers]
    kinds = {kind: sum(group["kind"] == kind for group in groups) for kind in tables.KINDS}
    if kind := arguments.get("kind"):
        groups = [group for group in groups if group["kind"] == kind]
    page, rows, pages = paged(tables.sorted_rows(groups, column, direction), arguments)
    at = names.index(file)
    [row] = run.index.query("SELECT step, split FROM rollouts WHERE file = ? LIMIT 1", (file,))
    return {
        "file": file,
        "chosen": chosen.arguments,
        "list_of": chosen.arguments | {"split": row["split"], "from": row["step"], "to": row["step"]},
        "search": search,
        "reasons": reasons(run),
        "groups": rows,
        "kinds": kinds,
        "kind": kind or "",
        "num_groups": len(groups),
        "num_rollouts": sum(len(group["rollouts"]) for group in groups),
        "envs": tables.environments(run.index),
        "env": wanted["env"],
        "page": page,
        "pages": pages,
        "before": names[at - 1] if at else None,
        "after": names[at + 1] if at + 1 < len(names) else None,
    }


def reasons(run: ViewedRun) -> list[str]:
    """Returns the causes and limits that rollouts of the run ended by."""
    found = run.index.query("SELECT DISTINCT why FROM rollouts WHERE why <> '' ORDER BY why LIMIT 100")
    return [row["why"] for row in found]


def group_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """The rollouts of a group, two of them side by side."""
    file, number = place["file"], whole_number(place, "group", 0)
    groups = tables.group_rows(run.index, file)
    numbers = [group["group"] for group in groups]
    if number not in numbers:
        raise BadAddress(f"{file} has no group {number}")
    here = numbers.index(number)
    group = groups[here]
    visits = run.index.query(
        "SELECT file, step, MIN(grp) AS grp, AVG(reward) AS reward FROM rollouts WHERE key = ? "
        "GROUP BY file ORDER BY step",
        (group["key"],),
    )
    left, right = _two(group["rollouts"], arguments)
    return {
        "group": group,
        "file": file,
        "rows": group["rollouts"],
        "visits": visits,
        "before": numbers[here - 1] if here else None,
        "after": numbers[here + 1] if here + 1 < len(numbers) else None,
        "left": left,
        "right": right,
    }


def _two(rollouts: list[dict[str, Any]], arguments: Arguments) -> tuple[Any, Any]:
    """Returns the two rollouts to show side by side: those of the URL, else the best and the worst one."""
    by_number = {rollout["number"]: rollout for rollout in rollouts}
    scored = sorted((r for r in rollouts if r["reward"] is not None), key=lambda r: -r["reward"])
    ranked = scored + [r for r in rollouts if r["reward"] is None]
    left = by_number.get(whole_number(arguments, "a", ranked[0]["number"]), ranked[0])
    right = by_number.get(whole_number(arguments, "b", ranked[-1]["number"]), ranked[-1])
    return left, right


def tasks_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """A row a task: always, sometimes or never solved."""
    splits = [r["split"] for r in run.index.query("SELECT DISTINCT split FROM rollouts ORDER BY split")]
    split = arguments.get("split") or (splits[0] if splits else "train")
    column, direction = sorting(arguments, dict.fromkeys(_TASK_SORTS), "key")
    tasks = tables.task_rows(run.index, split, arguments.get("env", ""))
    kinds = {kind: sum(t["kind"] == kind for t in tasks) for kind in ("always", "sometimes", "never")}
    if kind := arguments.get("kind"):
        tasks = [task for task in tasks if task["kind"] == kind]
    page, rows, pages = paged(tables.sorted_rows(tasks, column, direction), arguments)
    return {
        "report": charts_of_panels([task_map(tasks, split)]),
        "rows": rows,
        "num": len(tasks),
        "kinds": kinds,
        "kind": kind or "",
        "split": split,
        "splits": splits,
        "env": arguments.get("env", ""),
        "envs": tables.environments(run.index),
        "page": page,
        "pages": pages,
    }


def rollouts_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """The rollouts that the URL's arguments select."""
    chosen = selection(arguments)
    search = run.search.find(chosen, SEARCH_S)
    num = run.index.query(f"SELECT COUNT(*) AS num FROM rollouts WHERE {chosen.where}", chosen.parameters)
    is_whole = arguments.get("page") == ALL
    limit = max(PAGE, num[0]["num"]) if is_whole else PAGE
    pages = max(1, -(-num[0]["num"] // limit))
    page = 1 if is_whole else min(max(1, whole_number(arguments, "page", 1)), pages)
    rows = run.index.query(
        "SELECT *, (SELECT found FROM searched AS s WHERE s.needle = :needle AND s.file = rollouts.file "
        f"AND s.number = rollouts.number) AS found FROM rollouts WHERE {chosen.where} "
        f"ORDER BY {chosen.order} LIMIT :limit OFFSET :offset",
        chosen.parameters | {"limit": limit, "offset": (page - 1) * limit},
    )
    return {
        "rows": rows,
        "num": num[0]["num"],
        "page": page,
        "pages": pages,
        "chosen": chosen.arguments,
        "search": search,
        "envs": tables.environments(run.index),
        "reasons": reasons(run),
    }


def config_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """The configuration, the overrides and the versions, without secrets."""
    names = ("overrides.yaml", "config.yaml", "versions.txt", "code/git-commit.txt", "data/mix.json")
    texts = {name: run.files.read_text(name) for name in names}
    return {"texts": {name: without_secrets(text) for name, text in texts.items() if text}}


def logs_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """The list of the run's logs."""
    return {"names": run.files.names("logs", ".log")}


def log_page(run: ViewedRun, place: Place, arguments: Arguments) -> Context:
    """The end of a log, without secrets."""
    name = place["name"]
    if name not in run.files.names("logs", ".log"):
        raise BadAddress(f"the run has no log {name}")
    try:
        text, size = run.files.tail(f"logs/{name}", _LOG_BYTES)
    except RunDirectoryError as error:
        raise BadAddress(str(error)) from None
    return {"name": name, "text": without_secrets(text), "size": size, "is_cut": size > _LOG_BYTES}
