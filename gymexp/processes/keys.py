"""The keys that a run's servers demand, on every path, of whoever asks: other users of the machine, and over
several nodes of its network, reach their ports.

They are made anew at each start, and passed in the environment, which Linux shows to its owner alone: not on
a command line, and in no file but `lead.json` (mode 0600), by which the nodes of a run find each other.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.typedefs import Middleware

RUN = "GYMEXP_RUN_KEY"
POLICY = "GYMEXP_POLICY_KEY"
ENGINE = "GYMEXP_ENGINE_KEY"


@dataclass(frozen=True)
class Keys:
    """run: of the control endpoint and the gateway. policy: of NeMo Gym's servers, and of what they ask of
    the gateway: with it one can sample, and nothing else. engine: of the engines."""

    run: str = field(repr=False)
    policy: str = field(repr=False)
    engine: str = field(repr=False)

    @classmethod
    def new(cls) -> Keys:
        return cls(*(secrets.token_urlsafe(32) for _ in range(3)))

    def environ(self) -> dict[str, str]:
        """For a process that asks all of the run's servers."""
        return {RUN: self.run, POLICY: self.policy, ENGINE: self.engine}


def required(name: str) -> str:
    """The key in this process's environment. Exits, with what to do, where there is none: a server would
    answer everybody."""
    if not (key := os.environ.get(name)):
        raise SystemExit(
            f"{name} must be in the environment: the key that is demanded of whoever asks this server, "
            "`openssl rand -hex 32` makes one"
        )
    return key


def header(key: str | None) -> dict[str, str]:
    """What a client says. None: it has no key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def header_of(name: str) -> dict[str, str]:
    """As `header`, with the key in this process's environment."""
    return header(os.environ.get(name))


def fits(given: str | None, key: str) -> bool:
    """Whether an Authorization header has the key; compared in a time that tells nothing of it."""
    return hmac.compare_digest((given or "").encode(errors="replace"), f"Bearer {key}".encode())


def guard(key: str, others: Mapping[str, str] | None = None) -> Middleware:
    """What answers 401 in front of every route, and of what is none, to whoever has not the key.

    others: paths that another key opens as well.
    """
    more = dict(others or {})

    @web.middleware
    async def demand_key(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = request.headers.get("Authorization")
        if not any([fits(given, key), fits(given, more.get(request.path, key))]):
            raise web.HTTPUnauthorized(text="the run's key is missing, or is not this one's\n")
        return await handler(request)

    return demand_key
