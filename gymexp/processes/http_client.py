"""HTTP between the processes of a run without a proxy, even if http_proxy is set.

Many clusters set http_proxy for requests to other networks. aiohttp ignores it anyway.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Mapping
from typing import Any

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def open_url(request: str | urllib.request.Request, timeout_s: float) -> Any:
    """Opens a URL like `urllib.request.urlopen`, but without a proxy."""
    return _opener.open(request, timeout=timeout_s)


def fetch(url: str, body: bytes | None, timeout_s: float, headers: Mapping[str, str]) -> bytes:
    """A server's answer to a GET, or to a POST of the JSON text `body`.

    Raises OSError or http.client.HTTPException.
    """
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    with open_url(request, timeout_s) as response:
        return response.read()


def fetch_json(url: str, body: bytes | None, timeout_s: float, headers: Mapping[str, str]) -> Any:
    """A server's JSON answer to a GET, or to a POST of the JSON text `body`; None for an empty answer.

    Raises OSError or http.client.HTTPException.
    """
    text = fetch(url, body, timeout_s, headers)
    return json.loads(text) if text.strip() else None


def no_proxy(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns environment variables that keep other programs from using a proxy on loopback.

    Both spellings are set, as some programs read only `no_proxy` and others only `NO_PROXY`.
    """
    hosts = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    value = ",".join(filter(None, [hosts, "127.0.0.1,localhost"]))
    return {"no_proxy": value, "NO_PROXY": value}
