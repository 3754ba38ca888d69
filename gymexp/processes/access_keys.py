"""The keys that a run's servers demand from every client, on every path.

Other users of the machine can reach the servers' ports, and with several nodes so can other users of the
network. Keys are made anew at each start. They are passed in the environment, which Linux shows only to its
owner. No command line contains a key, and no file but `lead.json` (mode 0600), by which the nodes of a run
find each other.
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
    """The three keys of a run.

    run: opens the control endpoint and the gateway. policy: opens NeMo Gym's servers, and the gateway's
    routes that these servers call; a client that has it can sample, and nothing else. engine: opens the
    engines.
    """

    run: str = field(repr=False)
    policy: str = field(repr=False)
    engine: str = field(repr=False)

    @classmethod
    def new(cls) -> Keys:
        return cls(*(secrets.token_urlsafe(32) for _ in range(3)))

    def environ(self) -> dict[str, str]:
        """Returns the environment variables for a process that sends requests to all of the run's servers."""
        return {RUN: self.run, POLICY: self.policy, ENGINE: self.engine}


def required(name: str) -> str:
    """Returns the key in the environment variable `name`.

    Raises SystemExit with a fix if the variable is missing, as a server without a key would answer everybody.
    """
    if not (key := os.environ.get(name)):
        raise SystemExit(
            f"{name} must be in the environment: it is the key that this server demands from its clients; "
            "`openssl rand -hex 32` makes one"
        )
    return key


def header(key: str | None) -> dict[str, str]:
    """Returns the HTTP header with a client's key; no header if `key` is None or empty."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def header_of(name: str) -> dict[str, str]:
    """Returns the HTTP header with the key in the environment variable `name`; no header if it is missing."""
    return header(os.environ.get(name))


def fits(authorization: str | None, key: str) -> bool:
    """Returns whether an Authorization header contains the key. The comparison takes constant time."""
    return hmac.compare_digest((authorization or "").encode(errors="replace"), f"Bearer {key}".encode())


def guard(key: str, others: Mapping[str, str] | None = None) -> Middleware:
    """Returns middleware that answers 401 on every path, even an unknown one, to a client without the key.

    others: paths that another key opens as well, with that key.
    """
    key_of_path = dict(others or {})

    @web.middleware
    async def demand_key(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        authorization = request.headers.get("Authorization")
        if not any([fits(authorization, key), fits(authorization, key_of_path.get(request.path, key))]):
            raise web.HTTPUnauthorized(text="the key is missing, or is not this server's\n")
        return await handler(request)

    return demand_key
