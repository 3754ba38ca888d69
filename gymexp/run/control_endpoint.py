"""The control endpoint: a small HTTP server through which the controller and the trainer exchange messages.

It listens on loopback, or on the node's address if the run has several nodes. Every path requires the run's
key (`gymexp.processes.access_keys`).

    GET /watch            streams a JSON line at every change of a service, and at least one a second:
                          {"services": {name: {state, epoch, rss_mb, log}}}
    POST /restart/{name}  restarts a service
    POST /wake            {"names", "twins"}: starts the spare services of these names; answers 507 if
                          there is too little memory for services as large as their twins
    POST /rest            {"names"}: ends the spare services of these names
    POST /progress        takes the facts that the live view shows, as JSON
    POST /alive/{name}    records a sign of life of a trainer
    GET /node             is the websocket of the agents of other nodes (`gymexp.cluster.lead`)
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web

from gymexp.cluster.lead import Nodes
from gymexp.processes import ports
from gymexp.processes.access_keys import guard
from gymexp.processes.supervisor import Supervisor

_BEAT_S = 1.0


class Control:
    """The control endpoint, served on `sock` to clients with the run's key.

    on_progress: called with each progress report of the trainer.
    """

    def __init__(self, sock: socket.socket, key: str, on_progress: Callable[[dict[str, Any]], None]) -> None:
        self._sock = sock
        self._key = key
        self._on_progress = on_progress
        self._changed = asyncio.Event()
        self.supervisor: Supervisor | None = None
        self.nodes: Nodes | None = None

    @property
    def url(self) -> str:
        return ports.url_of(self._sock)

    def changed(self) -> None:
        """Sends the services' state to every client of /watch."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Control:
        app = web.Application(middlewares=[guard(self._key)])
        app.add_routes(
            [
                web.get("/watch", self._watch),
                web.post("/restart/{name}", self._restart),
                web.post("/wake", self._wake),
                web.post("/rest", self._rest),
                web.post("/progress", self._progress),
                web.post("/alive/{name}", self._alive),
                *([web.get("/node", self.nodes.welcome)] if self.nodes else []),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.SockSite(self._runner, self._sock).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    def _state(self) -> bytes:
        services = self.supervisor.services.values() if self.supervisor else ()
        state = {
            s.name: {"state": s.state, "epoch": s.epoch, "rss_mb": round(s.rss_mb, 1), "log": str(s.log)}
            for s in services
        }
        return orjson.dumps({"services": state}) + b"\n"

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):  # the trainer ended
            while True:
                changed = self._changed
                await response.write(self._state())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_BEAT_S):
                        await changed.wait()
        return response

    async def _restart(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if self.supervisor is None or name not in self.supervisor.services:
            raise web.HTTPNotFound(text=f"no service is named {name}")
        self.supervisor.restart(name)
        return web.Response()

    async def _wake(self, request: web.Request) -> web.Response:
        asked = orjson.loads(await request.read())
        if self.supervisor is None or not self.supervisor.has_memory_for(asked["twins"]):
            raise web.HTTPInsufficientStorage(text="too little memory is free")
        for name in asked["names"]:
            self.supervisor.wake(name)
        return web.Response()

    async def _rest(self, request: web.Request) -> web.Response:
        for name in orjson.loads(await request.read())["names"]:
            if self.supervisor:
                self.supervisor.rest(name)
        return web.Response()

    async def _alive(self, request: web.Request) -> web.Response:
        if self.supervisor:
            self.supervisor.heard(request.match_info["name"])
        return web.Response()

    async def _progress(self, request: web.Request) -> web.Response:
        self._on_progress(orjson.loads(await request.read()))
        return web.Response()
