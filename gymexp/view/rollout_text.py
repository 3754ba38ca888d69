"""Rollouts as text: a table of many, and one as a conversation with the environment's verdict. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gymexp.rollout.items import text_of

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
    for role, text in _messages(record, task_row):
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


def _messages(record: Mapping[str, Any], task_row: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Yields (who, text) of each message: of the task, of the policy and the environment, and the verdict."""
    if task_row is None:
        yield "task", "(its row is not in the run directory)"
    else:
        asked = task_row["responses_create_params"]["input"]
        for message in [{"role": "user", "content": asked}] if isinstance(asked, str) else asked:
            yield _from_item(message)
    if record["outcome"] == "failed":
        yield "failed", f"{record['cause']}: {record['detail']}"
        if record["log"]:
            yield "log", record["log"]
        return
    rollout = record["rollout"]
    for item in rollout["items"]:
        yield _from_item(item, of_policy=True)
    if rollout["refused"]:
        yield "refused", rollout["refused"]
    for name, value in rollout.get("verdict", {}).items():
        yield "verdict", f"{name}: {value if isinstance(value, str) else json.dumps(value)}"


def _from_item(item: Mapping[str, Any], of_policy: bool = False) -> tuple[str, str]:
    """Returns (who, text) of an item of OpenAI's Responses API."""
    match item.get("type", "message"):
        case "message":
            role = str(item.get("role") or "assistant")
            return ("policy" if of_policy and role == "assistant" else role), text_of(item.get("content"))
        case "function_call":
            return "call", f"{item.get('name')}({item.get('arguments', '')})"
        case "function_call_output":
            return "tool", text_of(item.get("output"))
        case "reasoning":
            return "reasoning", text_of(item.get("summary") or item.get("content"))
        case other:
            return str(other), json.dumps(item)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
