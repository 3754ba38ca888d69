"""When a rollout must have ended: servers tell each other the seconds that it has left.

A part of host.py, in NeMo Gym's venv; it imports nothing of gymexp. A judge that accepts a call and never
answers is named only if the call ends before the rollout does, whose end has no name but the agent's.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Any

HEADER = "x-gymexp-seconds-left"  # the collector sends it to the agent, and servers send it to each other
_DEADLINE: ContextVar[float | None] = ContextVar("deadline", default=None)  # as time.monotonic()


def seconds_left() -> float | None:
    """Returns the seconds that the rollout of this request has left; None if nobody said so."""
    deadline = _DEADLINE.get()
    return None if deadline is None else deadline - time.monotonic()


def headers() -> dict[str, str]:
    """Returns what a request to another server adds."""
    left = seconds_left()
    return {} if left is None else {HEADER: f"{max(left, 0.0):.3f}"}


def with_deadline(app: Any) -> Any:
    """Returns the ASGI application, which knows the deadline of the rollout whose request it answers."""
    name = HEADER.encode()

    async def told(scope: dict, receive: Any, send: Any) -> None:
        sent = [value for key, value in scope.get("headers", ()) if key == name]
        try:
            _DEADLINE.set(time.monotonic() + float(sent[0]) if sent else None)
        except ValueError:
            _DEADLINE.set(None)
        await app(scope, receive, send)

    return told
