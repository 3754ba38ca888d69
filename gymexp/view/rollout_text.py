"""Rollouts as text: a table of many, and one as a conversation with the environment's verdict. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gymexp.view.messages import conversation_of, verdict_of

_FOLD = 2_000  # characters of one message that are shown; `full` shows all
_NAME_WIDTH = 9


def rollout_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table with a line for each line of the index."""
    head = ("number", "task", "reward", "outcome", "turns", "tokens", "nll", "seconds", "last words")
    table = [head, *(_table_row(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in table
    )


def _table_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    seconds = row.get("seconds", {}).get("total")
    return (
        str(row["number"]),
        row["key"],
        _number(row.get("reward")),
        _ending(row),
        str(row.get("turns", "–")),
        str(row.get("tokens", "–")),
        _number(row.get("nll")),
        "–" if seconds is None else f"{seconds:.1f}",
        " ".join(row["text"].split()),
    )


def _ending(row: Mapping[str, Any]) -> str:
    reason = row.get("limit") or row.get("cause") or ("refused" if row.get("refused") else "")
    return f"{row['outcome']}{f' ({reason})' if reason else ''}"


def conversation(
    row: Mapping[str, Any],
    record: Mapping[str, Any],
    task_row: Mapping[str, Any] | None,
    full: bool = False,
) -> str:
    """Returns one rollout: its numbers, its messages in order, and the verdict.

    row: its line of the index. record: the outcome, as `read_outcome` returns it. task_row: the dataset row
    of its task, for the messages before the policy's; None if the run directory does not have it. full:
    whether to show long messages whole.
    """
    lines = [f"{row['key']}   {row['file']}, rollout {row['number']}, group {row['group']}", _facts(row), ""]
    said = [(message.who, message.text) for message in conversation_of(record, task_row)]
    said += [("verdict", f"{name}: {value}") for name, value in verdict_of(record).items()]
    for role, text in said:
        name = " ".join(role.split())  # an environment's role must not look like a line of another kind
        shown = text if full or len(text) <= _FOLD else f"{text[:_FOLD]} … ({len(text)} characters)"
        first, *rest = shown.splitlines() or [""]
        lines.append(f"{name:<{_NAME_WIDTH}} {first}".rstrip())
        lines += [f"{'':<{_NAME_WIDTH}} {line}".rstrip() for line in rest]
    return "\n".join(lines)


def _facts(row: Mapping[str, Any]) -> str:
    seconds = row.get("seconds", {})
    parts = [
        f"reward {_number(row.get('reward'))}{', success' if row.get('success') else ''}",
        _ending(row),
        f"failed before: {', '.join(row['failures'])}" if row.get("failures") else "",
        f"{row['turns']} turns, {row['tokens']} tokens, nll {row['nll']:.3f}" if "turns" in row else "",
        ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()),
        f"replica {row['replica']}" if row.get("replica") else "",
        f"seed {row['seed']}" if row.get("seed") is not None else "",
        f"weights of step {row['weights_version']}" if row.get("weights_version") is not None else "",
    ]
    return " · ".join(part for part in parts if part)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
