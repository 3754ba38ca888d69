"""Serves the routes of a gateway, of token ids or of text, behind a guard that checks keys."""

from __future__ import annotations

import socket

from aiohttp import web

from gymexp.processes import access_keys

FOR_NEMO_GYM = ("/v1/chat/completions", "/v1/models", "/tokenize")


def guard_of_environment() -> access_keys.Middleware:
    """Returns the guard of a gateway's paths: each takes the run's key, and those for NeMo Gym take the
    policy's key too. Raises SystemExit if the environment lacks one of them."""
    return access_keys.guard(
        access_keys.required(access_keys.RUN),
        dict.fromkeys(FOR_NEMO_GYM, access_keys.required(access_keys.POLICY)),
    )


def serve(app: web.Application, sock: socket.socket, guard: access_keys.Middleware) -> None:
    """Serves a gateway's routes, behind its guard, until a signal ends the process."""
    app.middlewares.insert(0, guard)
    web.run_app(
        app,
        sock=sock,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=2.0,
        print=lambda *_: None,
    )
