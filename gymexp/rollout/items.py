"""What the items of an episode say: the text of a message, tool calls, and tool calls that failed. Pure.

Items are the messages and tool calls of an episode, as NeMo Gym's output has them (OpenAI's Responses API).
NeMo Gym has no field for the error of a tool: an agent appends whatever the resources server answered, with
any status, as the text of a `function_call_output`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

_MAX_BYTES = 1 << 20  # a longer output is no error message, and parsing it would take milliseconds
# Python's way to write an exception (`KeyError('x')`, `ValueError: x`), and texts like "Error searching: x".
_EXCEPTION = re.compile(r"\w*(?:Error|Exception)\b(?:\(|[^\n:]{0,200}:)")
# What NeMo Gym's and Starlette's servers answer when an exception reached them (nemo_gym/server_utils.py).
_CRASHES = ("Hit an exception in ", "An unknown error occurred", "Internal Server Error")


def text_of(content: Any) -> str:
    """Returns the text of a message's content in OpenAI's Responses API: a string, or a list of parts."""
    if isinstance(content, list):
        return "".join(_text_of_part(part) for part in content)
    return content if isinstance(content, str) else json.dumps(content)


def _text_of_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else json.dumps(part)


def last_text(items: Sequence[Mapping[str, Any]]) -> str:
    """Returns the text of the last message among the items of an episode; "" if it has none."""
    messages = (item for item in reversed(items) if item.get("type", "message") == "message")
    return next((text_of(item.get("content")) for item in messages), "")


def num_tool_calls(items: Sequence[Mapping[str, Any]]) -> int:
    """Returns the number of tool calls among the items of an episode."""
    return sum(item.get("type") == "function_call" for item in items)


def num_tool_errors(items: Sequence[Mapping[str, Any]]) -> int:
    """Returns the number of tool calls whose output says that the call failed (`is_error`)."""
    return sum(item.get("type") == "function_call_output" and is_error(item.get("output")) for item in items)


def is_error(output: Any) -> bool:
    """Returns whether the output of a tool call, a text or a list of parts, reports an error.

    These forms count, which the servers and agents of NeMo Gym 0.4 use:

    * a JSON object with a value in `error` (simple_agent for arguments that are no JSON, openenv, ns_tools),
      with `is_error` or `isError` true (MCP), or with `success` false;
    * a JSON object that has `detail` alone: FastAPI's answer for an unknown path, invalid arguments (422) or
      an HTTPException;
    * a text in Python's form of an exception, or one that begins like "Error searching emails: …". It may be
      the whole output, a JSON string (NeMo Gym's answer with status 500), or the only value of a JSON object
      (workplace_assistant: {"output": "Error executing tool …"}).

    A refusal in plain words, like "Event not found.", cannot be told from an answer and does not count. So
    the number is a lower bound.
    """
    text = text_of(output)
    if len(text) > _MAX_BYTES:
        return False
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = text
    if isinstance(value, dict):
        if value.get("error") or True in (value.get("is_error"), value.get("isError")):
            return True
        if value.get("success") is False or value.keys() == {"detail"}:
            return True
        value = next(iter(value.values())) if len(value) == 1 else None
    return isinstance(value, str) and bool(_EXCEPTION.match(value) or value.startswith(_CRASHES))
