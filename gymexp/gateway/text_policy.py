"""A policy that answers chat completions with text alone: its interface, and the form of its answers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4


@dataclass(frozen=True)
class Answer:
    """A policy's reply. message: OpenAI's message of the assistant. usage: `prompt_tokens` and
    `completion_tokens`, as far as the policy counts them."""

    message: dict[str, Any]
    finish_reason: str
    usage: dict[str, int]

    def to_json(self, model: str) -> dict[str, Any]:
        """Returns OpenAI's response with this answer. model: the name that it gives for the model."""
        choice = {"index": 0, "finish_reason": self.finish_reason, "logprobs": None, "message": self.message}
        response = {
            "id": f"chatcmpl-{uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [choice],
        }
        if self.usage.keys() == {"prompt_tokens", "completion_tokens"}:
            response["usage"] = self.usage | {"total_tokens": sum(self.usage.values())}
        return response


class TextPolicy(Protocol):
    """What the text gateway asks for answers."""

    async def answer(self, body: Mapping[str, Any]) -> Answer:
        """Answers a chat request of NeMo Gym's. Raises EngineError; BadRequest if the prompt is too
        long."""
        ...

    async def problem(self) -> str:
        """Returns why no request can succeed, with a fix; "" if one may."""
        ...
