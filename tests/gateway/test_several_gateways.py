"""Several gateways in front of the same engines: an update meets no request of any of them, what one sees of
an engine counts for all, and one that is started again costs the others nothing.

The engine's tokens say which weights sampled them, so the gateways' word is compared token by token.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import torch
from aiohttp import web
from scripted_engine import TOKENIZER, chat
from test_updates import Site, check_spans, ids_of
from versioned_engine import VersionedEngine

from gymexp.engine.admission import Admission
from gymexp.engine.replicas import Replicas
from gymexp.engine.weight_sync import WeightSync
from gymexp.engine.weight_transfer import DiskTransfer
from gymexp.gateway.server import GatewayConfig, build_app


@dataclass
class Several:
    """Gateways, each with what was asked of it, and the trainer's side of an update."""

    gateways: list[Site]
    engines: list[VersionedEngine]
    urls: list[str]
    sync: WeightSync
    restart: Any  # a coroutine function: replaces the gateway of this number by a new process

    def ask(self, count: int, max_tokens: Sequence[int]) -> list[list[asyncio.Task]]:
        """Requests for each gateway, of different prompts."""
        return [
            [
                one.ask(limit, messages=[{"role": "user", "content": f"{number} of {limit}"}])
                for number, limit in zip(range(count), max_tokens, strict=True)
            ]
            for one in self.gateways
        ]

    async def update(self, version: int) -> None:
        weights = [("w", torch.tensor([float(version)]))]
        await asyncio.to_thread(self.sync.update, version, [], iter(weights))

    async def tend(self, asked_for: list[int] | None = None) -> None:
        """asked_for: gets an entry if weights are asked for."""

        def weights() -> Any:
            if asked_for is not None:
                asked_for.append(1)
            return iter([("w", torch.tensor([1.0]))])

        await asyncio.to_thread(self.sync.tend, weights)

    async def stats(self) -> list[dict]:
        return [await one.stats() for one in self.gateways]

    async def check(self, asked: list[list[asyncio.Task]]) -> list[list[list[list[int]]]]:
        """Asserts of all answers that each gateway knows the versions of its own. Returns these."""
        spans = []
        for one, own in zip(self.gateways, asked, strict=True):
            answers = await asyncio.gather(*own)
            spans.append(await one.spans_of(answers))
            check_spans(answers, spans[-1])
        return spans


@asynccontextmanager
async def several(directory: Path, num_engines: int = 2) -> AsyncIterator[Several]:
    async with AsyncExitStack() as stack:
        engines = [VersionedEngine() for _ in range(num_engines)]
        urls = [await stack.enter_async_context(engine.serve()) for engine in engines]
        config = GatewayConfig(
            tuple(urls), max_model_len=500, engine_timeout_s=30.0, hold=True, is_one_of_several=True
        )
        runners: list[web.AppRunner] = []

        async def start(port: int = 0) -> web.AppRunner:
            runner = web.AppRunner(
                build_app(config, TOKENIZER), handler_cancellation=True, shutdown_timeout=0.1
            )
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            return runner

        async def restart(number: int) -> None:
            port = runners[number].addresses[0][1]
            await runners[number].cleanup()
            runners[number] = await start(port)

        for _ in range(2):
            runners.append(await start())
        at = [f"http://127.0.0.1:{runner.addresses[0][1]}" for runner in runners]
        https = [await stack.enter_async_context(aiohttp.ClientSession(url)) for url in at]
        sync = await asyncio.to_thread(
            lambda: WeightSync(
                Replicas(urls, timeout_s=20.0),
                DiskTransfer(directory / "weights"),
                Admission(at, None, 20.0),
                directory / "again",
            )
        )
        gateways = [Site(engines, urls, http, sync) for http in https]
        yield Several(gateways, engines, urls, sync, restart)
        for runner in runners:
            await runner.cleanup()


def test_an_update_meets_no_request_of_any_gateway_and_every_token_is_known(tmp_path):
    rng = random.Random(4)

    async def run():
        async with several(tmp_path) as on:
            asked: list[list[asyncio.Task]] = [[], []]
            for version in range(1, 5):
                limits = [rng.choice((1, 5, 60, 150, 300)) for _ in range(6)]
                for own, more in zip(asked, on.ask(6, limits), strict=True):
                    own += more
                await asyncio.sleep(rng.uniform(0, 0.15))
                await on.update(version)
            return await on.check(asked), on.engines, await on.stats(), asked

    spans, engines, stats, asked = asyncio.run(run())
    assert [engine.most_at_a_load for engine in engines] == [0, 0]
    num_tokens = sum(len(ids_of(task.result())[1]) for own in asked for task in own)
    assert num_tokens == sum((engines[0].given + engines[1].given).values()), "no token is lost"
    for of_gateway, of_spans in zip(stats, spans, strict=True):
        assert of_gateway["fenced"] == of_gateway["on_hold"] == of_gateway["untold"] == []
        assert of_gateway["cuts"] > 0 and max(map(len, of_spans)) >= 2


def test_a_group_meets_its_prompt_at_one_engine_through_whichever_gateway(tmp_path):
    async def run():
        async with several(tmp_path) as on:
            for number in range(12):
                message = [{"role": "user", "content": f"task {number}"}]
                for one in on.gateways:
                    assert (await chat(one.http, messages=message, max_tokens=1))[0] == 200
            return [[tuple(sent["token_ids"]) for sent in engine.requests] for engine in on.engines]

    first, second = asyncio.run(run())
    assert set(first).isdisjoint(second)
    assert len(first) + len(second) == 24 and len(first) > 0 and len(second) > 0


def test_an_engine_that_one_gateway_saw_go_away_gets_no_request_of_any_until_it_has_the_weights(tmp_path):
    async def run():
        async with several(tmp_path) as on:
            asked = on.ask(6, [200] * 6)
            await asyncio.sleep(0.1)
            await on.gateways[0].http.post("/engine", json={"urls": [on.urls[1]], "state": "on_hold"})
            on.engines[1].is_dead = True
            await on.update(1)
            held = await on.stats()
            later = on.ask(4, [3] * 4)
            await asyncio.gather(*(task for own in later for task in own))
            of_second = on.engines[1].version
            on.engines[1].come_back()
            await on.tend()
            opened = await on.stats()
            for own, more in zip(asked, later, strict=True):
                own += more
            return held, of_second, opened, await on.check(asked), on

    held, of_second, opened, spans, on = asyncio.run(run())
    assert [of_gateway["on_hold"] for of_gateway in held] == [[on.urls[1]]] * 2
    assert of_second == 0, "it was left out of the update"
    assert on.engines[1].version == 1
    assert [of_gateway["on_hold"] for of_gateway in opened] == [[], []]
    later = [of_answer for of_gateway in spans for of_answer in of_gateway[6:]]
    assert later == [[[1, 3]]] * 8, "none was sampled with the old weights"


def test_a_gateway_that_is_started_again_asks_the_engines_of_the_others_without_new_weights(tmp_path):
    async def run():
        async with several(tmp_path) as on:
            await on.update(1)
            asked = on.ask(3, [150] * 3)[0]  # the second one's are lost with it
            await asyncio.sleep(0.05)
            await on.restart(1)
            held = await on.stats()
            asked_for: list[int] = []
            await on.tend(asked_for)
            answers = await asyncio.gather(*asked)
            known = await on.gateways[0].spans_of(answers)
            on.gateways[1].plays.clear()
            again = [on.gateways[1].ask(4)]
            spans = await on.gateways[1].spans_of(await asyncio.gather(*again))
            return held, asked_for, known, answers, spans, await on.stats(), on.urls

    held, asked_for, known, answers, spans, after, urls = asyncio.run(run())
    assert [one["on_hold"] for one in held] == [[], sorted(urls)]
    assert held[1]["untold"] == sorted(urls)
    assert asked_for == [], "the engines have the weights"
    check_spans(answers, known)
    assert known == [[[1, 150]]] * 3, "no update has cut the first gateway's requests, nor a hold"
    assert spans == [[[1, 4]]]
    assert [one["on_hold"] for one in after] == [[], []]


def test_an_engine_on_hold_stays_there_when_a_gateway_is_started_again(tmp_path):
    async def run():
        async with several(tmp_path) as on:
            await on.update(1)
            on.engines[1].is_dead = True
            await asyncio.to_thread(on.sync._admission.hold, on.urls[1])
            await on.restart(0)
            await on.tend()
            held = await on.stats()
            on.engines[1].come_back()
            asked_for: list[int] = []
            await on.tend(asked_for)
            return held, asked_for, on.engines[1].version, await on.stats(), on.urls

    held, asked_for, version, after, urls = asyncio.run(run())
    assert [one["on_hold"] for one in held] == [[urls[1]]] * 2
    assert asked_for == [] and version == 1, "by the file of the update"
    assert [one["on_hold"] for one in after] == [[], []]


def test_the_engines_get_the_weights_again_if_all_gateways_are_started_again(tmp_path):
    async def run():
        async with several(tmp_path) as on:
            await on.update(1)
            for engine in on.engines:
                engine.version = 0  # as if they had been started again meanwhile, which nobody knows
            for number in range(2):
                await on.restart(number)
            asked = on.ask(2, [3, 3])
            await asyncio.sleep(0.1)
            assert all(not engine.requests for engine in on.engines)
            await on.tend()
            return await on.check(asked)

    assert asyncio.run(run()) == [[[[1, 3]], [[1, 3]]]] * 2
