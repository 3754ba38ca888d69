"""Decides which engines get requests. Each gateway keeps a list of engines on hold, and of those that an
update of the weights has fenced; the controller and the trainer change these over HTTP, at all gateways.

Three processes can be the first to see that an engine must get no requests, and put it on hold. A gateway
sees that an engine broke off a request. The controller sees that an engine's process ended, and tells the
gateway before it starts the process again, as the new process has the weights that the run began with. The
trainer sees that an engine did not take its weights. Only the trainer opens an engine, once the engine has
the policy's weights. A fence is the trainer's alone, for the time of an update.

What one gateway has put on hold, the trainer puts on hold at all of them before it sends weights. A gateway
that is started again has all engines on hold, and says that nobody told it of them since; the trainer opens
those that another gateway has open.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
    """Changes and reads the gateways' lists of engines on hold. Its methods raise ServiceError if a gateway
    does not answer. They ask again if a gateway breaks a connection off, as it does when it is restarted.
    """

    def __init__(self, gateway_urls: Sequence[str], key: str | None, timeout_s: float) -> None:
        """key: the run's key. timeout_s: how long to wait for an answer of a gateway."""
        self._gateway_urls = list(gateway_urls)
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
        left. cut: make the gateways give up those that are left, and leave none."""
        drain = Drain(list(urls), timeout_s, cut)
        answers = self._ask("/drain", orjson.dumps(asdict(drain)))
        return sum(sum(answer["in_flight"].values()) for answer in answers)

    def updated(self, urls: Sequence[str], weights_version: int) -> None:
        """Tells the gateways that the engines, unless they are on hold, sample with weights of this version
        from now on, and lifts their fence.
        """
        self._change(EngineChange(list(urls), EngineState.UPDATED, weights_version))

    def hold(self, url: str) -> None:
        """Puts the engine on hold, so that it gets no more requests."""
        self._change(EngineChange([url], EngineState.ON_HOLD))

    def on_hold(self) -> list[str]:
        """Returns the urls of the engines that get no requests until they are opened: those that a gateway
        has put on hold, which it puts on hold at the other gateways, and those of which no gateway was told.
        """
        answers = self._ask("/stats")
        held = {url for answer in answers for url in answer["on_hold"] if url not in answer["untold"]}
        for url in sorted(held):
            change = EngineChange([url], EngineState.ON_HOLD)
            self._change(change, [at for at, one in self._pairs(answers) if url not in one["on_hold"]])
        return sorted(held.union(set.intersection(*(set(answer["untold"]) for answer in answers))))

    def loads(self) -> list[Any]:
        """Returns each gateway's `gateway.load.Load.totals`."""
        return [answer["load"] for answer in self._ask("/stats")]

    def introduce(self, weights_version: int | None) -> None:
        """Opens engines at the gateways that were started again, where another gateway has them open.
        weights_version: of the weights that all open engines have."""
        if len(self._gateway_urls) == 1:
            return
        answers = self._ask("/stats")
        for at, answer in self._pairs(answers):
            untold = answer["untold"]
            if urls := [url for url in untold if any(url not in one["on_hold"] for one in answers)]:
                self._change(EngineChange(urls, EngineState.OPEN, weights_version), [at])

    def _pairs(self, answers: Sequence[Any]) -> list[tuple[str, Any]]:
        return list(zip(self._gateway_urls, answers, strict=True))

    def _change(self, change: EngineChange, gateway_urls: Sequence[str] | None = None) -> None:
        """gateway_urls: of the gateways that are told; None for all."""
        self._ask("/engine", orjson.dumps(asdict(change)), gateway_urls)

    def _ask(
        self, path: str, body: bytes | None = None, gateway_urls: Sequence[str] | None = None
    ) -> list[Any]:
        """Returns the gateways' JSON answers to a GET, or with a body to a POST, sent to all at once."""
        urls = self._gateway_urls if gateway_urls is None else gateway_urls
        if len(urls) <= 1:
            return [self._request(url, path, body) for url in urls]
        with ThreadPoolExecutor(len(urls)) as pool:
            return list(pool.map(lambda url: self._request(url, path, body), urls))

    def _request(self, gateway_url: str, path: str, body: bytes | None) -> Any:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                return fetch_json(
                    f"{gateway_url}{path}", body, self._timeout_s, access_keys.header(self._key)
                )
            except (OSError, ValueError, http.client.HTTPException) as error:
                if not _is_broken_off(error) or time.monotonic() > deadline:
                    raise ServiceError(f"the gateway did not answer {path}: {error}") from None
                time.sleep(_PAUSE_S)


def _is_broken_off(error: Exception) -> bool:
    """Returns whether the error is a connection that was made, and that the other end broke off."""
    reason = getattr(error, "reason", error)
    return isinstance(reason, ConnectionResetError | BrokenPipeError | http.client.IncompleteRead)
