"""The probe: a policy without a model, whose canned replies show what a grader pays for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gymexp.gateway.chat import BadRequest
from gymexp.gateway.text_policy import Answer
from gymexp.rollout.tokens import content_text

ECHO = "prompt"  # the reply that repeats the last message of the user
REPLIES = {
    "empty": "",
    ECHO: "",
    "yes": "yes",
    "refusal": "I'm sorry, but I can't help with that.",
    "digits": "0 1 2 3 4 5 6 7 8 9",
}


class Probe:
    """Gives the chosen reply to every request, and never calls a tool."""

    def __init__(self) -> None:
        self._name = "empty"

    def choose(self, name: Any) -> None:
        """Chooses one of REPLIES. Raises BadRequest for another name."""
        if name not in REPLIES:
            raise BadRequest(f"reply must be one of {', '.join(REPLIES)}, got {name!r}")
        self._name = name

    async def answer(self, body: Mapping[str, Any]) -> Answer:
        text = REPLIES[self._name]
        if self._name == ECHO:
            asked = [m for m in body.get("messages", ()) if isinstance(m, dict) and m.get("role") == "user"]
            text = content_text(asked[-1]) if asked else ""
        return Answer({"role": "assistant", "content": text}, "stop", {})

    async def problem(self) -> str:
        return ""
