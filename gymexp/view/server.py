"""The viewer's web server, on loopback alone: its routes, and what each request is checked for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

import plotly
from aiohttp import web

from gymexp.errors import GymexpError
from gymexp.view.access import HEADERS, LOOPBACK, Access
from gymexp.view.filters import BadAddress
from gymexp.view.links import PAGES, server_link
from gymexp.view.site import Site, as_csv, is_searched
from gymexp.view.viewed_run import ViewedRun

_HERE = Path(__file__).parent
_REPORT = _HERE.parent / "report"
# Name below /static/ -> file. There are no others.
ASSETS = {
    "page.css": _REPORT / "page.css",
    "view.css": _HERE / "view.css",
    "view.js": _HERE / "view.js",
    "charts.js": _REPORT / "charts.js",
    "plotly.js": Path(plotly.__file__).parent / "package_data" / "plotly.min.js",
}
_TYPES = {".css": "text/css", ".js": "text/javascript"}
_POLL_S = 1.0  # seconds between two looks for news of a live run
_PATIENCE_S = 1.5  # for the first reading of an index, before the page shows how far it is
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(site: Site, access: Access) -> web.Application:
    """Returns the web application of the viewer."""

    @web.middleware
    async def checked(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.query.get("token")
        refused = access.refusal(request.method, request.headers, request.cookies, given)
        if refused:
            status, reason = refused
            answer = web.Response(status=status, text=f"{reason}\n")
        elif given is not None:
            answer = _with_cookie(request, access)
        else:
            answer = await _answered(request, handler, site)
        if not answer.prepared:
            answer.headers.update(HEADERS)
        return answer

    app = web.Application(middlewares=[checked])
    app.router.add_get("/", partial(_front, site))
    app.router.add_get("/static/{name}", _asset)
    app.router.add_get("/r/{run}/events", partial(_events, site))
    for page, (path, _) in PAGES.items():
        app.router.add_get(f"/r/{{run}}/{path}", partial(_page, site, page))
    return app


def _with_cookie(request: web.Request, access: Access) -> web.Response:
    """Returns a redirection to the same address without the token, which a cookie now has."""
    rest = [(name, value) for name, value in request.query.items() if name != "token"]
    location = request.path + (f"?{urlencode(rest)}" if rest else "")
    # A path that begins with two slashes would be another host's address.
    answer = web.Response(status=303, headers={"Location": "/" + location.lstrip("/")})
    answer.set_cookie(access.cookie, access.token, httponly=True, samesite="Strict", path="/")
    return answer


async def _answered(request: web.Request, handler: Handler, site: Site) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return _html(site.problem("No such page", "There is no page at this address."), 404)
    except BadAddress as error:
        return _html(site.problem("No such page", str(error)), 404)
    except GymexpError as error:
        return _html(site.problem("The run directory cannot be shown", str(error)), 409)


def _html(text: str, status: int = 200) -> web.Response:
    # Half of a surrogate pair can be in a text that was read, and in no encoding.
    body = text.encode("utf-8", errors="backslashreplace")
    return web.Response(status=status, body=body, content_type="text/html", charset="utf-8")


async def _front(site: Site, request: web.Request) -> web.StreamResponse:
    if len(site.runs) == 1:
        [run] = site.runs.values()
        return web.Response(status=303, headers={"Location": server_link(run.slug, "run")})
    return _html(await asyncio.to_thread(site.front))


async def _asset(request: web.Request) -> web.StreamResponse:
    path = ASSETS.get(request.match_info["name"])
    if path is None or not path.exists():
        raise web.HTTPNotFound()
    return web.Response(body=path.read_bytes(), content_type=_TYPES[path.suffix], charset="utf-8")


def _run(site: Site, request: web.Request) -> ViewedRun:
    run = site.runs.get(request.match_info["run"])
    if run is None:
        raise BadAddress("the viewer shows no run of this name")
    return run


async def _page(site: Site, page: str, request: web.Request) -> web.StreamResponse:
    run = _run(site, request)
    refreshed = asyncio.create_task(asyncio.to_thread(run.refresh))
    await asyncio.wait([refreshed], timeout=_PATIENCE_S if not run.index.is_ready else None)
    if refreshed.done():
        refreshed.result()
    arguments = {name: value for name, value in request.query.items()}
    place = dict(request.match_info)
    if page == "csv":
        while not await asyncio.to_thread(is_searched, run, arguments):
            pass  # a part of the rows would look like all of them
        text = await asyncio.to_thread(as_csv, run, arguments)
        headers = {"Content-Disposition": f'attachment; filename="{run.slug}.csv"'}
        body = text.encode("utf-8", errors="backslashreplace")
        return web.Response(body=body, content_type="text/csv", charset="utf-8", headers=headers)
    return _html(await asyncio.to_thread(site.render, run, page, place, arguments))


async def _events(site: Site, request: web.Request) -> web.StreamResponse:
    """Sends an event whenever the run has written something that its pages show."""
    run = _run(site, request)
    answer = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream"})
    await answer.prepare(request)
    shown = run.version, run.search.version
    with contextlib.suppress(ConnectionError, asyncio.CancelledError):
        while True:
            await asyncio.to_thread(run.refresh)
            is_new = shown != (run.version, run.search.version)
            shown = run.version, run.search.version
            await answer.write(b"data: changed\n\n" if is_new else b": still here\n\n")
            await asyncio.sleep(_POLL_S)
    return answer


async def serve(site: Site, port: int, ready: Callable[[Access], None]) -> None:
    """Serves until the process is interrupted. ready: called with the access once the port is open. port: 0
    for one of the system's choice. Raises GymexpError if the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
    except OSError as error:
        listener.close()
        raise GymexpError(
            f"--port must be free on this machine, but {port} is not: {error.strerror}"
        ) from None
    access = Access(listener.getsockname()[1])
    runner = web.AppRunner(build_app(site, access), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        ready(access)
        await asyncio.to_thread(site.prepare)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
