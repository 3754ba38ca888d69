"""Which tool calls of an endpoint's reply may go on to NeMo Gym."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from uuid import uuid4


def checked_calls(calls: Any, tools: Sequence[Any], parallel: bool) -> list[dict[str, Any]]:
    """Returns the calls of a reply in OpenAI's form; [] if one of them is malformed: its arguments are no
    JSON object, or its name is none of the tools. NeMo Gym uses the name as a URL path, so an invented name
    could reach another route of the server.

    tools: those of the request. parallel: False keeps only the first call.
    """
    names = {tool["function"]["name"] for tool in tools if isinstance(tool, dict) and "function" in tool}
    checked = []
    try:
        for call in calls:
            function = call["function"]
            if function["name"] not in names or not isinstance(json.loads(function["arguments"]), dict):
                return []
            checked.append(
                {
                    "id": str(call.get("id") or f"call_{uuid4().hex}"),
                    "type": "function",
                    "function": {"name": function["name"], "arguments": function["arguments"]},
                }
            )
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    return checked if parallel else checked[:1]
