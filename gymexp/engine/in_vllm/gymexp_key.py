"""Middleware for vLLM's API servers (`--middleware`) that demands the engine's key. It runs in vLLM's
interpreter, so it imports nothing of gymexp.

vLLM's own --api-key guards only /v1, /v2, /inference and /cohere (0.31, `middleware/authenticate.py`). The
routes of its development mode, which replace weights and call any method of its workers, take no key.
"""

from __future__ import annotations

import hmac
import os
from typing import Any

ENGINE = "GYMEXP_ENGINE_KEY"
_REFUSED = b'{"error": "the engine\'s key is missing or wrong"}'


class DemandsKey:
    """ASGI middleware that answers 401, on every path and method, to a request without the key. It closes a
    websocket without the key.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._expected = b"Bearer " + os.environ[ENGINE].encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSED})

    def _has_key(self, scope: dict[str, Any]) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(values) == 1 and hmac.compare_digest(values[0], self._expected)
