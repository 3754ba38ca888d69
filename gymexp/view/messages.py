"""A rollout as a conversation: its messages in order, whatever shape an environment gave them. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gymexp.rollout.items import text_of

Source = Literal["task", "policy", "environment", "failure"]
_MISSING = "(its row is not in the run directory)"


@dataclass(frozen=True)
class Message:
    """who: the role, or what the text is. source: who wrote the text."""

    who: str
    text: str
    source: Source


def conversation_of(record: Mapping[str, Any], task_row: Mapping[str, Any] | None) -> Iterator[Message]:
    """Yields the messages of the task, then those of the policy and the environment, then why it failed or
    was refused.

    record: the outcome, as `read_outcome` returns it. task_row: the dataset row of its task; None if the run
    directory does not have it.
    """
    yield from _asked(task_row)
    if record.get("outcome") == "failed":
        yield Message("failed", f"{record.get('cause')}: {record.get('detail')}", "failure")
        if record.get("log"):
            yield Message("log", str(record["log"]), "failure")
        return
    rollout = _mapping(record.get("rollout"))
    for item in _list(rollout.get("items")):
        yield _from_item(item)
    if rollout.get("refused"):
        yield Message("refused", str(rollout["refused"]), "failure")


def verdict_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Returns the fields of the environment's answer beside the reward, each as text."""
    verdict = _mapping(_mapping(record.get("rollout")).get("verdict"))
    return {str(name): as_text(value) for name, value in verdict.items()}


def as_text(value: Any) -> str:
    """Returns a text as it is, and another value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _asked(task_row: Mapping[str, Any] | None) -> Iterator[Message]:
    if task_row is None:
        yield Message("task", _MISSING, "task")
        return
    asked = _mapping(task_row.get("responses_create_params")).get("input")
    for message in asked if isinstance(asked, list) else [{"role": "user", "content": asked}]:
        if isinstance(message, dict):
            who, text = _who_and_text(message)
            yield Message(who, text, "task")
        else:
            yield Message("task", as_text(message), "task")


def _from_item(item: Any) -> Message:
    """Returns an item of OpenAI's Responses API, as NeMo Gym's output has them."""
    if not isinstance(item, dict):
        return Message("item", as_text(item), "environment")
    who, text = _who_and_text(item)
    of_policy = who in ("assistant", "call", "reasoning")
    return Message("policy" if who == "assistant" else who, text, "policy" if of_policy else "environment")


def _who_and_text(item: Mapping[str, Any]) -> tuple[str, str]:
    match item.get("type") or "message":
        case "message":
            return str(item.get("role") or "assistant"), text_of(item.get("content"))
        case "function_call":
            return "call", f"{item.get('name')}({as_text(item.get('arguments') or '')})"
        case "function_call_output":
            return "tool", text_of(item.get("output"))
        case "reasoning":
            return "reasoning", text_of(item.get("summary") or item.get("content"))
        case other:
            return str(other), json.dumps(item, ensure_ascii=False)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
