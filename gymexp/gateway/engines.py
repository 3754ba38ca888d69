"""The gateway's client of the engines: sends token ids, gets token ids and log-probabilities, and spreads the
requests over replicas.

The protocol is vLLM's `POST /inference/v1/generate` (from 0.30 behind --enable-scale-out) and `GET /health`.

An update of the weights never meets a request. The trainer fences the engines, so that further requests wait,
cuts those in flight or lets them end, and sends the weights once none is in flight (`drain`). Then it lifts
the fence. So each piece of a generation was sampled with weights of one version.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import aiohttp
from aiohttp import web

from gymexp.engine.adapter import name_of
from gymexp.gateway.load import Load
from gymexp.gateway.pieces import Pieces
from gymexp.gateway.spread import engine_for
from gymexp.processes.access_keys import ENGINE, header_of
from gymexp.rollout.generation import EngineError, Generation, read_answer, start_of

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 5.0
# uvicorn, which serves vLLM, closes idle connections after 5 s. A request sent at that moment would fail, so
# the gateway closes idle connections first.
KEEPALIVE_S = 3.0
REMEMBERED_TURNS = 65536
_POLL_S = 0.01


class EngineLost(EngineError):
    """The engine went away during a request. No part of its generation is kept, so another engine may take
    the request.
    """


class EngineReplaced(EngineLost):
    """The engine was restarted while the request waited in its socket, so the answer comes from other
    weights.
    """


class EngineRefusal(Exception):
    """An engine rejects the request itself as wrong (HTTP 400 or 422)."""


class Engines:
    """Replicas of one policy. A rollout's first turn goes to the least busy replica, its later turns to the
    same replica, whose cache has their prefix. Where several gateways send requests to the same replicas,
    each knows its own requests alone: a first turn then goes where `spread.engine_for` says.

    Correctness does not depend on that cache. So the map from turns to replicas is bounded, and is lost with
    this process.
    """

    def __init__(
        self,
        urls: tuple[str, ...],
        timeout_s: float,
        hold: bool = False,
        decode: Callable[[list[int]], str] | None = None,
        names_adapter: bool = False,
        is_one_of_several: bool = False,
    ):
        """timeout_s: for one generation, including the wait for an engine. hold: whether an engine starts on
        hold and gets requests only after `open`, and is put on hold again when it goes away, as it may come
        back with other weights. decode: as in `Pieces`. names_adapter: whether each request names the
        policy's adapter, with the version of its weights; an engine whose version is unknown gets none.
        is_one_of_several: whether other gateways send requests to the same replicas.
        """
        self.load = Load(url.rstrip("/") for url in urls)
        self.in_flight = self.load.in_flight
        self.on_hold = set(self.in_flight) if hold else set[str]()
        self.untold = set(self.on_hold)  # those on hold since this process began, of which nobody told it
        self.fenced = set[str]()
        self.num_cuts = 0  # pieces after which a generation had to go on
        self._versions: dict[str, int] = {}  # of the weights last sent to each engine
        self._holds = Counter[str]()  # how often each engine was put on hold
        self._requests = {url: set[asyncio.Timeout]() for url in self.in_flight}
        self._hold = hold
        self._names_adapter = names_adapter
        self._decode = decode
        self._is_one_of_several = is_one_of_several
        self._opened = asyncio.Event()
        self._timeout_s = timeout_s
        self._url_of_turn: OrderedDict[int, str] = OrderedDict()
        self._session: aiohttp.ClientSession | None = None

    def open(self, url: str, weights_version: int | None) -> None:
        """Takes the engine off hold, so that it gets requests. weights_version: of the weights that it
        samples with; None if unknown.
        """
        self.on_hold.discard(url)
        self.untold.discard(url)
        self.updated([url], weights_version)

    def fence(self, urls: Sequence[str]) -> None:
        """Keeps further requests from the engines until `updated`."""
        self.fenced.update(urls)

    def updated(self, urls: Sequence[str], version: int | None) -> None:
        """Lifts the fence of the engines, which sample with weights of `version` from now on; None stands for
        an unknown version. An engine on hold stays there. The fences are lifted at once, as otherwise all
        waiting requests would go to the first engine.
        """
        self.fenced.difference_update(urls)
        if version is not None:
            self._versions |= {url: version for url in urls if url not in self.on_hold}
        self._opened.set()
        self._opened = asyncio.Event()

    async def drain(self, urls: Sequence[str], timeout_s: float, cut: bool) -> dict[str, int]:
        """Waits until no request is in flight at the engines, but at most timeout_s. Returns how many are
        left at each engine that has some.

        cut: close the connections of those that are left then, and leave none. What an engine has sampled
        for them is lost, and the same piece is requested again after the update.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while left := {url: self.in_flight[url] for url in urls if self.in_flight[url]}:
            if asyncio.get_running_loop().time() >= deadline:
                if not cut:
                    break
                for request in [request for url in left for request in self._requests[url]]:
                    if not request.expired():
                        request.reschedule(deadline)
                cut = False
                deadline += timeout_s
            await asyncio.sleep(_POLL_S)
        return left

    def hold(self, url: str) -> None:
        """Puts the engine on hold: it gets no more requests until `open`."""
        self._versions.pop(url, None)
        self._holds[url] += 1
        self.on_hold.add(url)
        self.untold.discard(url)

    async def connect(self, app: web.Application) -> AsyncIterator[None]:
        """Opens the HTTP session before the app starts, and closes it when the app ends (for
        `app.cleanup_ctx`).
        """
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        key = header_of(ENGINE)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=key) as self._session:
            yield

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], continues: int
    ) -> Generation:
        """Returns the engines' generation for the prompt, in one piece.

        continues: how many of prompt_ids are the previous turn's prompt and generation, 0 in a first turn.
        Cancelling closes the connection, and the engine then drops the request. With `hold`, an engine that
        goes away during the request costs only time: the same ids, with the pieces that there are, go to
        another engine, or to the same one once it is open again. Raises EngineError if no engine answers in
        time or an answer is wrong, EngineRefusal if the engine rejects the request.
        """
        pieces = Pieces(prompt_ids, sampling_params, self._decode)
        url = "(none was open)"
        try:
            async with asyncio.timeout(self._timeout_s):
                while not pieces.is_finished:
                    url = await self._pick(prompt_ids, continues)
                    try:
                        model = name_of(self._versions[url]) if self._names_adapter else None
                        pieces.add(await self._post_request(url, pieces.payload(model)))
                        self.num_cuts += not pieces.is_finished
                    except EngineReplaced as error:
                        log.warning("%s; the request is sent again", error)
                    except EngineLost as error:
                        if not self._hold:
                            raise
                        if url not in self.on_hold:
                            log.warning("%s; it gets no requests until weights are sent to it", error)
                            self.hold(url)
        except TimeoutError:
            raise EngineError(f"engine {url}: no generation within {self._timeout_s:g} s") from None
        generation = pieces.whole()
        self._remember(prompt_ids + generation.token_ids, url)
        return generation

    async def _post_request(self, url: str, payload: bytes) -> Generation:
        """Returns what the engine at `url` sampled until it ended by itself, or was cut by an update. Raises
        EngineLost, EngineReplaced, EngineRefusal, EngineError.
        """
        first_version, num_holds = self._versions.get(url), self._holds[url]
        try:
            answer = await self._answer(url, payload)
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLost(f"engine {url}: {type(error).__name__}: {error}") from error
        if answer is None:
            return Generation([], [], "abort", [])
        status, body = answer
        if self._hold and self._holds[url] != num_holds:
            raise EngineReplaced(f"engine {url} was restarted during a request")
        if status in (400, 422):
            raise EngineRefusal(f"engine {url} refuses the request: {start_of(body)}")
        if status != 200:
            # vLLM answers 500 while it shuts down; then its health check fails too.
            is_lost = self._hold and await self._check_health(url)
            error_type = EngineLost if is_lost else EngineError
            raise error_type(f"engine {url} answered {status}: {start_of(body)}")
        try:
            generation = read_answer(body)
        except EngineError as error:
            raise EngineError(f"engine {url} {error}") from error
        if generation.finish_reason == "abort" and url not in self.fenced:
            raise EngineError(f"engine {url} cut a generation off, though no weights are sent to it")
        # Engines that slept were updated without a fence: a request may have met that update.
        is_known = first_version is not None and first_version == self._versions.get(url)
        if generation.versions is not None or not is_known:
            return generation
        return replace(generation, versions=[(first_version, len(generation.token_ids))])

    async def _answer(self, url: str, payload: bytes) -> tuple[int, bytes] | None:
        """Returns status and body of an engine's answer; None if `drain` cut the request. Raises
        aiohttp.ClientError, OSError."""
        assert self._session is not None, "connect first"
        headers = {"Content-Type": "application/json"}
        post = self._session.post(f"{url}/inference/v1/generate", data=payload, headers=headers)
        request = asyncio.timeout(None)  # `drain` gives it a deadline
        self.load.change(url, 1)
        self._requests[url].add(request)
        try:
            async with request, post as response:
                return response.status, await response.read()
        except TimeoutError:
            if request.expired():
                return None
            raise
        finally:
            self.load.change(url, -1)
            self._requests[url].discard(request)

    async def ill(self) -> dict[str, str]:
        """Returns the engines that fail their health check, each with the status or error that it gave."""
        answers = await asyncio.gather(*map(self._check_health, self.in_flight))
        return {url: answer for url, answer in zip(self.in_flight, answers, strict=True) if answer}

    async def _check_health(self, url: str) -> str:
        """Returns "" if the engine answers its health check with 200, else the status or the error."""
        assert self._session is not None, "connect first"
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with self._session.get(f"{url}/health", timeout=timeout) as response:
                return "" if response.status == 200 else f"status {response.status}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return f"{type(error).__name__}: {error}"

    async def _pick(self, prompt_ids: list[int], continues: int) -> str:
        """Returns the engine for a request, once one is open: the one that sampled the turn before, else the
        least busy one, or that of `spread`. continues: as in `generate`.
        """
        while not (urls := [url for url in self.in_flight if self._takes_requests(url)]):
            await self._opened.wait()
        if len(self.in_flight) > 1 and continues:
            url = self._url_of_turn.get(hash(tuple(prompt_ids[:continues])))
            if url in urls:
                return url
        if self._is_one_of_several:
            return engine_for(prompt_ids, {url: self.in_flight[url] for url in urls})
        return min(urls, key=self.in_flight.__getitem__)

    def _takes_requests(self, url: str) -> bool:
        is_open = url not in self.on_hold and url not in self.fenced
        return is_open and (url in self._versions or not self._names_adapter)

    def _remember(self, turn_ids: list[int], url: str) -> None:
        if len(self.in_flight) == 1:
            return
        self._url_of_turn[hash(tuple(turn_ids))] = url
        if len(self._url_of_turn) > REMEMBERED_TURNS:
            self._url_of_turn.popitem(last=False)
