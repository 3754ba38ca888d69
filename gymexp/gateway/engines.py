"""Client of the token engines: ids in, ids and log-probabilities out, spread over replicas.

The protocol is vLLM's `POST /inference/v1/generate` (from 0.30 behind --enable-scale-out) and `GET /health`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from gymexp.processes.keys import ENGINE, header_of
from gymexp.rollout.generation import EngineError, Generation, read_answer, start_of

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 5.0
# uvicorn, in front of vLLM, closes idle connections after 5 s; a request sent at that moment would fail.
KEEPALIVE_S = 3.0
REMEMBERED_TURNS = 65536


class EngineLost(EngineError):
    """The engine went away under a request, of which nothing was kept: another one may take it."""


class EngineReplaced(EngineLost):
    """The engine was started anew under the request, which waited in its socket: other weights answered."""


class EngineRefusal(Exception):
    """An engine calls the request itself wrong (HTTP 400 or 422)."""


class Engines:
    """Replicas of one policy. A rollout's first turn goes to the least busy one, its later turns to the same.

    Later turns find the prefix in that replica's cache; correctness does not depend on it, so what remembers
    the way is bounded, and is this process's own.
    """

    def __init__(self, urls: tuple[str, ...], timeout_s: float, hold: bool = False):
        """timeout_s: for one generation, the wait for an engine included. hold: every engine is given
        requests only after `open`, and no more once it went away: it may come back with other weights."""
        self.in_flight = dict.fromkeys((url.rstrip("/") for url in urls), 0)
        self.on_hold = set(self.in_flight) if hold else set[str]()
        self._versions: dict[str, int] = {}  # of the weights that each engine was sent last
        self._holds = Counter[str]()  # how often each engine was held
        self._hold = hold
        self._opened = asyncio.Event()
        self._timeout_s = timeout_s
        self._url_of_turn: OrderedDict[int, str] = OrderedDict()
        self._session: aiohttp.ClientSession | None = None

    def open(self, url: str, weights_version: int | None) -> None:
        """Give it requests. weights_version: of what it samples with, where that is known."""
        self.on_hold.discard(url)
        self.sent_weights(url, weights_version)
        self._opened.set()
        self._opened = asyncio.Event()

    def sent_weights(self, url: str, version: int | None) -> None:
        """It samples with weights of that version from now on, unless it went away meanwhile."""
        if url not in self.on_hold and version is not None:
            self._versions[url] = version

    def hold(self, url: str) -> None:
        """Give it no more requests."""
        self._versions.pop(url, None)
        self._holds[url] += 1
        self.on_hold.add(url)

    async def connect(self, app: web.Application) -> AsyncIterator[None]:
        """For `app.cleanup_ctx`: the connections live as long as the app."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        key = header_of(ENGINE)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=key) as self._session:
            yield

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], continues: int
    ) -> Generation:
        """continues: how many of prompt_ids are the previous turn's prompt and generation, 0 in a first turn.

        Raises EngineError, EngineRefusal. Cancelling closes the connection, at which an engine drops the
        request. With `hold`, an engine that goes away meanwhile costs only time: the same ids go to another
        one, or to this one once it is open again.
        """
        payload = orjson.dumps({"token_ids": prompt_ids, "sampling_params": sampling_params})
        url = "(none was open)"
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    url = await self._pick(prompt_ids[:continues])
                    try:
                        generation = await self._ask(url, payload)
                        break
                    except EngineReplaced as error:
                        log.warning("%s; it is asked again", error)
                    except EngineLost as error:
                        if not self._hold:
                            raise
                        if url not in self.on_hold:
                            log.warning("%s; it gets no requests until weights are sent to it", error)
                            self.hold(url)
        except TimeoutError:
            raise EngineError(f"engine {url}: no generation within {self._timeout_s:g} s") from None
        self._remember(prompt_ids + generation.token_ids, url)
        return generation

    async def _ask(self, url: str, payload: bytes) -> Generation:
        assert self._session is not None, "connect first"
        headers = {"Content-Type": "application/json"}
        first_version, holds = self._versions.get(url), self._holds[url]
        self.in_flight[url] += 1
        try:
            async with self._session.post(
                f"{url}/inference/v1/generate", data=payload, headers=headers
            ) as response:
                status, body = response.status, await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLost(f"engine {url}: {type(error).__name__}: {error}") from error
        finally:
            self.in_flight[url] -= 1
        if self._hold and self._holds[url] != holds:
            raise EngineReplaced(f"engine {url} was started anew under a request")
        if status in (400, 422):
            raise EngineRefusal(f"engine {url} refuses the request: {start_of(body)}")
        if status != 200:
            ill = self._hold and await self._check(url)  # vLLM answers 500 while it goes down
            kind = EngineLost if ill else EngineError
            raise kind(f"engine {url} answered {status}: {start_of(body)}")
        try:
            generation = read_answer(body)
        except EngineError as error:
            raise EngineError(f"engine {url} {error}") from error
        last_version = self._versions.get(url)
        if generation.weights_versions or first_version is None or last_version is None:
            return generation
        return replace(generation, weights_versions=(first_version, last_version))

    async def ill(self) -> dict[str, str]:
        """The engines that do not answer their health check, with what they did instead."""
        answers = await asyncio.gather(*map(self._check, self.in_flight))
        return {url: answer for url, answer in zip(self.in_flight, answers, strict=True) if answer}

    async def _check(self, url: str) -> str:
        assert self._session is not None, "connect first"
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with self._session.get(f"{url}/health", timeout=timeout) as response:
                return "" if response.status == 200 else f"status {response.status}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return f"{type(error).__name__}: {error}"

    async def _pick(self, previous_ids: list[int]) -> str:
        while not (urls := [url for url in self.in_flight if url not in self.on_hold]):
            await self._opened.wait()
        if len(self.in_flight) > 1 and previous_ids:
            url = self._url_of_turn.get(hash(tuple(previous_ids)))
            if url in urls:
                return url
        return min(urls, key=self.in_flight.__getitem__)

    def _remember(self, turn_ids: list[int], url: str) -> None:
        if len(self.in_flight) == 1:
            return
        self._url_of_turn[hash(tuple(turn_ids))] = url
        if len(self._url_of_turn) > REMEMBERED_TURNS:
            self._url_of_turn.popitem(last=False)
