"""Decides which engines get requests. The gateway keeps the list of engines on hold; the controller and the
trainer change it over HTTP.

Three processes can be the first to see that an engine must get no requests, and put it on hold. The gateway
sees that an engine broke off a request. The controller sees that an engine's process ended, and tells the
gateway before it starts the process again, as the new process has the weights that the run began with. The
trainer sees that an engine did not take its weights. Only the trainer opens an engine, once the engine has
the policy's weights.
"""

from __future__ import annotations

import http.client
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import orjson

from gymexp.errors import ServiceError
from gymexp.processes import access_keys
from gymexp.processes.http_client import fetch_json


class EngineState(StrEnum):
    """What a change says about an engine.

    OPEN: the engine has the policy's weights and gets requests. UPDATED: the engine has new weights; if it is
    on hold, it stays on hold. ON_HOLD: the engine gets no requests.
    """

    OPEN = "open"
    UPDATED = "updated"
    ON_HOLD = "on_hold"


@dataclass(frozen=True)
class EngineChange:
    """The body of `POST /engine`. weights_version: in optimizer steps done; None if it is unknown."""

    url: str
    state: EngineState
    weights_version: int | None = None

    @classmethod
    def read(cls, body: dict[str, Any]) -> EngineChange:
        """Returns the change that a request's body describes. Raises ValueError if a field is wrong."""
        url, version = body.get("url"), body.get("weights_version")
        if not isinstance(url, str):
            raise ValueError(f"url must be a text, got {url!r}")
        if body.get("state") not in list(EngineState):
            raise ValueError(f"state must be one of {', '.join(EngineState)}, got {body.get('state')!r}")
        if version is not None and type(version) is not int:
            raise ValueError(f"weights_version must be an integer or null, got {version!r}")
        return cls(url, EngineState(body["state"]), version)


class Admission:
    """Changes and reads the gateway's list of engines on hold. Its methods raise ServiceError if the gateway
    does not answer.
    """

    def __init__(self, gateway_url: str, key: str | None, timeout_s: float) -> None:
        """key: the run's key. timeout_s: how long to wait for an answer of the gateway."""
        self._gateway_url = gateway_url
        self._key = key
        self._timeout_s = timeout_s

    def open(self, url: str, weights_version: int | None) -> None:
        """Takes the engine off hold, so that it gets requests."""
        self._change(EngineChange(url, EngineState.OPEN, weights_version))

    def updated(self, url: str, weights_version: int) -> None:
        """Tells the gateway that the engine, unless it is on hold, samples with weights of this version from
        now on.
        """
        self._change(EngineChange(url, EngineState.UPDATED, weights_version))

    def hold(self, url: str) -> None:
        """Puts the engine on hold, so that it gets no more requests."""
        self._change(EngineChange(url, EngineState.ON_HOLD))

    def on_hold(self) -> list[str]:
        """Returns the urls of the engines that get no requests."""
        return self._request("/stats", None)["on_hold"]

    def _change(self, change: EngineChange) -> None:
        self._request("/engine", orjson.dumps(asdict(change)))

    def _request(self, path: str, body: bytes | None) -> Any:
        """Returns the gateway's JSON answer to a GET, or with a body to a POST."""
        try:
            return fetch_json(
                f"{self._gateway_url}{path}", body, self._timeout_s, access_keys.header(self._key)
            )
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServiceError(f"the gateway did not answer {path}: {error}") from None
