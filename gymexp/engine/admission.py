"""Decides which engines get requests. The gateway keeps the list of engines on hold, and of those that an
update of the weights has fenced; the controller and the trainer change these over HTTP.

Three processes can be the first to see that an engine must get no requests, and put it on hold. The gateway
sees that an engine broke off a request. The controller sees that an engine's process ended, and tells the
gateway before it starts the process again, as the new process has the weights that the run began with. The
trainer sees that an engine did not take its weights. Only the trainer opens an engine, once the engine has
the policy's weights. A fence is the trainer's alone, for the time of an update.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import orjson

from gymexp.errors import ServiceError
from gymexp.processes import access_keys
from gymexp.processes.http_client import fetch_json

_PAUSE_S = 0.2  # between two attempts to reach the gateway


class EngineState(StrEnum):
    """What a change says about an engine.

    OPEN: the engine has the policy's weights and gets requests. FENCED: the engine gets no further requests
    until it is UPDATED: it has new weights; if it is on hold, it stays on hold. ON_HOLD: the engine gets no
    requests until it is OPEN.
    """

    OPEN = "open"
    FENCED = "fenced"
    UPDATED = "updated"
    ON_HOLD = "on_hold"


@dataclass(frozen=True)
class EngineChange:
    """The body of `POST /engine`. weights_version: in optimizer steps done; None if it is unknown."""

    urls: list[str]
    state: EngineState
    weights_version: int | None = None

    @classmethod
    def read(cls, body: dict[str, Any]) -> EngineChange:
        """Returns the change that a request's body describes. Raises ValueError if a field is wrong."""
        urls, version = read_urls(body), body.get("weights_version")
        if body.get("state") not in list(EngineState):
            raise ValueError(f"state must be one of {', '.join(EngineState)}, got {body.get('state')!r}")
        if version is not None and type(version) is not int:
            raise ValueError(f"weights_version must be an integer or null, got {version!r}")
        return cls(urls, EngineState(body["state"]), version)


@dataclass(frozen=True)
class Drain:
    """The body of `POST /drain`, which is answered with `in_flight`, the number of requests that are still in
    flight at each engine that has some. The fields are those of `gateway.engines.Engines.drain`.
    """

    urls: list[str]
    timeout_s: float
    cut: bool

    @classmethod
    def read(cls, body: dict[str, Any]) -> Drain:
        """Returns what a request's body describes. Raises ValueError if a field is wrong."""
        timeout_s, cut = body.get("timeout_s"), body.get("cut")
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or timeout_s < 0:
            raise ValueError(f"timeout_s must be a number >= 0, got {timeout_s!r}")
        if not isinstance(cut, bool):
            raise ValueError(f"cut must be a boolean, got {cut!r}")
        return cls(read_urls(body), timeout_s, cut)


def read_urls(body: dict[str, Any]) -> list[str]:
    """Returns the field `urls` of a request's body. Raises ValueError if it is wrong."""
    urls = body.get("urls")
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise ValueError(f"urls must be a list of texts, got {urls!r}")
    return urls


class Admission:
    """Changes and reads the gateway's list of engines on hold. Its methods raise ServiceError if the gateway
    does not answer. They ask again if the gateway breaks a connection off, as it does when it is restarted.
    """

    def __init__(self, gateway_url: str, key: str | None, timeout_s: float) -> None:
        """key: the run's key. timeout_s: how long to wait for an answer of the gateway."""
        self._gateway_url = gateway_url
        self._key = key
        self._timeout_s = timeout_s

    def open(self, url: str, weights_version: int | None) -> None:
        """Takes the engine off hold, so that it gets requests."""
        self._change(EngineChange([url], EngineState.OPEN, weights_version))

    def fence(self, urls: Sequence[str]) -> None:
        """Keeps further requests from the engines until `updated`."""
        self._change(EngineChange(list(urls), EngineState.FENCED))

    def in_flight(self, urls: Sequence[str], timeout_s: float, cut: bool = False) -> int:
        """Waits until no request is in flight at the engines, but at most timeout_s, and returns how many are
        left. cut: make the gateway give up those that are left, and leave none."""
        drain = Drain(list(urls), timeout_s, cut)
        return sum(self._request("/drain", orjson.dumps(asdict(drain)))["in_flight"].values())

    def updated(self, urls: Sequence[str], weights_version: int) -> None:
        """Tells the gateway that the engines, unless they are on hold, sample with weights of this version
        from now on, and lifts their fence.
        """
        self._change(EngineChange(list(urls), EngineState.UPDATED, weights_version))

    def hold(self, url: str) -> None:
        """Puts the engine on hold, so that it gets no more requests."""
        self._change(EngineChange([url], EngineState.ON_HOLD))

    def on_hold(self) -> list[str]:
        """Returns the urls of the engines that get no requests."""
        return self._request("/stats", None)["on_hold"]

    def _change(self, change: EngineChange) -> None:
        self._request("/engine", orjson.dumps(asdict(change)))

    def _request(self, path: str, body: bytes | None) -> Any:
        """Returns the gateway's JSON answer to a GET, or with a body to a POST."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                return fetch_json(
                    f"{self._gateway_url}{path}", body, self._timeout_s, access_keys.header(self._key)
                )
            except (OSError, ValueError, http.client.HTTPException) as error:
                if not _is_broken_off(error) or time.monotonic() > deadline:
                    raise ServiceError(f"the gateway did not answer {path}: {error}") from None
                time.sleep(_PAUSE_S)


def _is_broken_off(error: Exception) -> bool:
    """Returns whether the error is a connection that was made, and that the other end broke off."""
    reason = getattr(error, "reason", error)
    return isinstance(reason, ConnectionResetError | BrokenPipeError | http.client.IncompleteRead)
