"""What a URL selects of a run's rollouts, as SQL with parameters. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gymexp.errors import GymexpError

PAGE = 100  # rows on a page
NAMES = ("env", "split", "task", "outcome", "why", "from", "to", "min", "max", "text", "sort", "order")
# Column of the table -> the column, or expression, that sorts it.
SORTS = {
    "step": "step, file, number", "number": "number", "key": "key", "env": "env", "reward": "reward",
    "advantage": "advantage", "outcome": "outcome, why", "turns": "turns", "tokens": "tokens", "nll": "nll",
    "ratio": "ratio_max", "seconds": "total_s", "retries": "retries", "tools": "tool_calls",
    "errors": "tool_errors", "text": "text",
}  # fmt: skip


class BadAddress(GymexpError):
    """A URL asks for something that there is not; the message says what."""


@dataclass(frozen=True)
class Selection:
    """where, parameters: of the rows. order: of the rows, without the page.

    others: `where` without the text, which a search narrows down further. arguments: of the URL."""

    where: str
    others: str
    parameters: dict[str, Any]
    order: str
    arguments: dict[str, str]

    @property
    def needle(self) -> str | None:
        """The casefolded text that the rollouts must hold; None for any."""
        return self.parameters["needle"]

    def within(self, file: str) -> Selection:
        """Returns the part of the selection in one file of rollouts."""
        here = " AND file = :in_file"
        parameters = self.parameters | {"in_file": file}
        return replace(self, where=self.where + here, others=self.others + here, parameters=parameters)


def selection(arguments: Mapping[str, str]) -> Selection:
    """Returns what the arguments of a URL select. Raises BadAddress if one is not of its kind."""
    given = {name: arguments[name].strip() for name in NAMES if arguments.get(name, "").strip()}
    conditions: list[str] = ["1"]
    parameters: dict[str, Any] = {"needle": None}
    for name, column in (
        ("env", "env"),
        ("split", "split"),
        ("task", "key"),
        ("outcome", "outcome"),
        ("why", "why"),
    ):
        if name in given:
            conditions.append(f"{column} = :{name}")
            parameters[name] = given[name]
    for name, condition in (
        ("from", "step >= :from"),
        ("to", "step <= :to"),
        ("min", "reward >= :min"),
        ("max", "reward <= :max"),
    ):
        if name in given:
            conditions.append(condition)
            parameters[name] = _number(name, given[name])
    others = " AND ".join(conditions)
    if "text" in given:
        # The index has the task's key and the last words; the rest is there once the search has read it.
        escaped = given["text"].replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        conditions.append(
            "(text LIKE :text ESCAPE '\\' OR key LIKE :text ESCAPE '\\' OR (file, number) IN "
            "(SELECT file, number FROM searched WHERE needle = :needle AND found IS NOT NULL))"
        )
        parameters |= {"text": f"%{escaped}%", "needle": given["text"].casefold()}
    column, direction = sorting(arguments, SORTS, "step")
    expressions = [f"{part} {direction}" for part in SORTS[column].split(", ")]
    order = ", ".join([f"{expressions[0].split()[0]} IS NULL", *expressions, "file", "number"])
    return Selection(" AND ".join(conditions), others, parameters, order, given)


def sorting(arguments: Mapping[str, str], columns: Mapping[str, Any], default: str) -> tuple[str, str]:
    """Returns (column, ASC or DESC) of a URL. Raises BadAddress if the column is none of `columns`."""
    column, order = arguments.get("sort") or default, arguments.get("order") or "up"
    if column not in columns:
        raise BadAddress(f"sort must be one of {', '.join(columns)}, got {column!r}")
    if order not in ("up", "down"):
        raise BadAddress(f"order must be up or down, got {order!r}")
    return column, "ASC" if order == "up" else "DESC"


def whole_number(arguments: Mapping[str, str], name: str, default: int) -> int:
    """Returns a number of a URL that counts something. Raises BadAddress if it is none."""
    text = arguments.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise BadAddress(f"{name} must be a whole number, got {text!r}")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadAddress(f"{name} must be a number, got {text!r}")
    return value
