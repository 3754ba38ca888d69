"""HTTP among the processes of a run: never by way of a proxy, whatever http_proxy says, which many clusters
set for the world outside. (aiohttp asks none anyway.)"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Mapping
from typing import Any

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def open_url(request: str | urllib.request.Request, timeout_s: float) -> Any:
    """As `urllib.request.urlopen`."""
    return _opener.open(request, timeout=timeout_s)


def fetch_json(url: str, body: bytes | None, timeout_s: float, headers: Mapping[str, str]) -> Any:
    """A server's JSON answer to a GET, or to a POST of the JSON text `body`; None for an empty answer.

    Raises OSError or http.client.HTTPException.
    """
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    with open_url(request, timeout_s) as response:
        text = response.read()
    return json.loads(text) if text.strip() else None


def no_proxy(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What makes other people's programs do without one on loopback; both names are in use."""
    hosts = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    told = ",".join(filter(None, [hosts, "127.0.0.1,localhost"]))
    return {"no_proxy": told, "NO_PROXY": told}
