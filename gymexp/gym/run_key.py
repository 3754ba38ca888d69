"""The run's key for NeMo Gym: its servers send it to each other, and require it.

A part of host.py, in NeMo Gym's venv; it imports nothing of gymexp.
"""

from __future__ import annotations

import functools
import hmac
import os
import socket
import sys
from typing import Any


def session_with_key(key: str, config: dict) -> Any:
    """Returns aiohttp's client session, which sends the key and the seconds that the rollout has left to the
    servers of `config`, and to nobody else."""
    from aiohttp import ClientSession
    from rollout_deadline import headers  # pyright: ignore[reportMissingImports]

    servers = {
        (values["host"], values["port"])
        for entry in config.values()
        for kind in entry.values()
        if isinstance(kind, dict)
        for values in kind.values()
    }

    async def add_key(request: Any, handler: Any) -> Any:
        if (request.url.host, request.url.port) in servers:
            request.headers["Authorization"] = f"Bearer {key}"
            request.headers.update(headers())
        return await handler(request)

    return functools.partial(ClientSession, middlewares=(add_key,))


def require_key(key: str | None, app: Any) -> Any:
    """Returns the ASGI application with a check before it: a request must have the key or come from a program
    of this user. Some agents call the model server with an HTTP client of their own, which does not send the
    key."""
    if not key:
        return app
    expected = f"Bearer {key}".encode()

    async def guarded(scope: dict, receive: Any, send: Any) -> None:
        sent = b"".join(v for k, v in scope.get("headers", ()) if k == b"authorization")
        if scope["type"] == "lifespan" or hmac.compare_digest(sent, expected) or is_of_this_user(scope):
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"the run's key is missing or wrong\n"})

    return guarded


def is_of_this_user(scope: dict) -> bool:
    """Returns whether the other end of a connection is a socket that this user opened on this machine. False
    if the kernel does not tell. Source: proc_net(5) of Linux."""
    try:
        ends = [
            f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"
            for host, port in (scope["client"], scope["server"])
        ]
        with open("/proc/net/tcp") as table:
            for line in table:
                _, local, remote, state, _, _, _, uid, _, inode, *_ = line.split()
                if [local, remote] == ends:  # 01: established; a closed socket has no owner
                    return (state, int(uid)) == ("01", os.getuid()) and inode != "0"
    except (OSError, TypeError, ValueError, KeyError):
        pass
    return False
