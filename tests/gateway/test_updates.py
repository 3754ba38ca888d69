"""Updates of the weights while requests are in flight: each token is known to be of the weights that sampled
it, and no request is lost.

The engine's tokens say which weights sampled them, so the gateway's word is compared token by token.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from scripted_engine import TOKENIZER, chat, serve
from versioned_engine import FIRST_ID, VersionedEngine

from gymexp.config.schema import LoraConfig
from gymexp.engine import weight_sync
from gymexp.engine.adapter_transfer import AdapterTransfer
from gymexp.engine.admission import Admission
from gymexp.engine.replicas import Replicas
from gymexp.engine.weight_sync import WeightSync
from gymexp.engine.weight_transfer import DiskTransfer
from gymexp.errors import ServiceError
from gymexp.gateway.server import GatewayConfig, build_app
from gymexp.rollout.attempts import turn_key
from gymexp.rollout.draws import call_seed, piece_seed

MAX_MODEL_LEN = 500


@dataclass
class Site:
    """A gateway, its engines, and the trainer's side of an update."""

    engines: list[VersionedEngine]
    urls: list[str]
    http: aiohttp.ClientSession
    sync: WeightSync
    number: int = 0
    plays: list[str] = field(default_factory=list)

    def ask(self, max_tokens: int, **fields: Any) -> asyncio.Task:
        self.number += 1
        self.plays.append(f"play {self.number}")
        more = {"seed": self.number, "play": self.plays[-1], "max_tokens": max_tokens} | fields
        return asyncio.create_task(chat(self.http, **more))

    async def update(self, version: int) -> None:
        weights = [("base_model.model.w.lora_A.weight", torch.tensor([float(version)]))]
        await asyncio.to_thread(self.sync.update, version, [], iter(weights))

    async def tend(self, weights: Any = lambda: iter([("w", torch.tensor([1.0]))])) -> None:
        await asyncio.to_thread(self.sync.tend, weights)

    async def spans_of(self, answers: list[tuple[int, dict]]) -> list[list[list[int]]]:
        """The versions that the gateway knows of each answer's tokens."""
        async with self.http.post("/attempts", json={"plays": self.plays}) as response:
            attempts = (await response.json())["attempts"]
        keys = [turn_key(*ids_of(answer)) for answer in answers]
        return [attempt["versions"][key] for attempt, key in zip(attempts, keys, strict=True)]

    async def stats(self) -> dict:
        return await (await self.http.get("/stats")).json()


@asynccontextmanager
async def site(directory: Path, num_engines: int = 2, adapter: bool = False, **options: Any):
    """adapter: whether the weights are an adapter, which goes to the engines as one."""
    async with AsyncExitStack() as stack:
        engines = [VersionedEngine() for _ in range(num_engines)]
        urls = [await stack.enter_async_context(engine.serve()) for engine in engines]
        config = GatewayConfig(
            tuple(urls), max_model_len=MAX_MODEL_LEN, engine_timeout_s=30.0, hold=True, adapter=adapter
        )
        transfer = (
            AdapterTransfer(directory / "weights", LoraConfig(r=4))
            if adapter
            else DiskTransfer(directory / "weights")
        )
        if adapter:
            options["first_version"] = None
        url = await stack.enter_async_context(serve(build_app(config, TOKENIZER)))
        http = await stack.enter_async_context(aiohttp.ClientSession(url))
        sync = await asyncio.to_thread(
            lambda: WeightSync(
                Replicas(urls, timeout_s=20.0),
                transfer,
                Admission([url], None, 20.0),
                directory / "again",
                **options,
            )
        )
        yield Site(engines, urls, http, sync)


def ids_of(answer: tuple[int, dict]) -> tuple[list[int], list[int]]:
    status, body = answer
    assert status == 200, body
    message = body["choices"][0]["message"]
    assert len(message["generation_log_probs"]) == len(message["generation_token_ids"])
    return message["prompt_token_ids"], message["generation_token_ids"]


def check_spans(answers: list[tuple[int, dict]], spans: list[list[list[int]]]) -> Counter[int]:
    """Asserts that the spans say of each token what the token says. Returns the tokens of each version."""
    for answer, of_answer in zip(answers, spans, strict=True):
        told = [version for version, count in of_answer for _ in range(count)]
        assert told == [token - FIRST_ID for token in ids_of(answer)[1]]
        assert told == sorted(told) and len({version for version, _ in of_answer}) == len(of_answer)
    return Counter(token - FIRST_ID for answer in answers for token in ids_of(answer)[1])


@pytest.mark.parametrize("adapter", [False, True])
def test_every_token_is_of_the_weights_that_the_gateway_says_and_none_is_lost(tmp_path, adapter):
    rng = random.Random(4)
    limits = [rng.choice((1, 5, 60, 150, 300)) for _ in range(24)]

    async def run():
        async with site(tmp_path, adapter=adapter) as on:
            if adapter:
                await on.update(0)  # else none of them would sample
            asked = []
            for version in range(1, 5):
                asked += [on.ask(limit) for limit in limits[len(asked) : 6 * version]]
                await asyncio.sleep(rng.uniform(0, 0.15))
                await on.update(version)
            answers = await asyncio.gather(*asked)
            return answers, await on.spans_of(answers), on.engines, await on.stats()

    answers, spans, engines, stats = asyncio.run(run())
    assert [len(ids_of(answer)[1]) for answer in answers] == limits
    assert check_spans(answers, spans) == engines[0].given + engines[1].given
    assert max(map(len, spans)) >= 3 and stats["cuts"] > 5
    assert [engine.most_at_a_load for engine in engines] == [0, 0]
    assert stats["fenced"] == stats["on_hold"] == [] and set(stats["engines"].values()) == {0}
    assert all(len(engine.requests) > 10 for engine in engines), "continued pieces are spread"
    if adapter:
        assert [engine.adapters for engine in engines] == [{"policy-4": 4}] * 2, "older ones are unloaded"


def test_the_pieces_share_one_limit_and_no_seed_and_go_on_where_the_last_one_ended(tmp_path):
    async def run():
        async with site(tmp_path, num_engines=1) as on:
            asked = on.ask(200)
            for version in (1, 2):
                await asyncio.sleep(0.1)
                await on.update(version)
            uncut = on.ask(3, seed=1)
            return await asked, await uncut, on.engines[0].requests

    answer, uncut, requests = asyncio.run(run())
    prompt, ids = ids_of(answer)
    seed = call_seed(1, prompt)
    assert len(requests) == 4
    for number, sent in enumerate(requests[:3]):
        done = sent["token_ids"][len(prompt) :]
        assert sent["token_ids"] == prompt + ids[: len(done)] and (len(done) > 0) == (number > 0)
        assert sent["sampling_params"]["max_tokens"] == 200 - len(done)
        assert sent["sampling_params"]["seed"] == piece_seed(seed, len(done))
    assert len({sent["sampling_params"]["seed"] for sent in requests[:3]}) == 3
    assert ids_of(uncut)[0] == prompt
    assert requests[3]["sampling_params"]["seed"] == seed, "what no update cuts is drawn as ever"


def test_the_context_is_no_longer_over_cuts(tmp_path):
    async def run():
        async with site(tmp_path, num_engines=1) as on:
            asked = on.ask(10_000)
            for version in (1, 2):
                await asyncio.sleep(0.05)
                await on.update(version)
            return await asked, on.engines[0].requests

    answer, requests = asyncio.run(run())
    prompt, ids = ids_of(answer)
    assert len(prompt + ids) == MAX_MODEL_LEN and len(requests) == 3
    assert answer[1]["choices"][0]["finish_reason"] == "length"


def test_without_cuts_an_update_waits_for_the_ends_and_further_requests_wait_for_the_update(tmp_path):
    async def run():
        async with site(tmp_path, cuts=False) as on:
            first = [on.ask(100), on.ask(30)]
            await asyncio.sleep(0.05)
            update = asyncio.create_task(on.update(1))
            while not (await on.stats())["fenced"]:
                await asyncio.sleep(0.01)
            later = [on.ask(5) for _ in range(4)]
            answers = await asyncio.gather(*first)
            assert not update.done() or update.result() is None
            await update
            answers += await asyncio.gather(*later)
            return answers, await on.spans_of(answers), (await on.stats())["cuts"]

    answers, spans, cuts = asyncio.run(run())
    assert spans == [[[0, 100]], [[0, 30]], *[[[1, 5]]] * 4] and cuts == 0
    check_spans(answers, spans)


def test_a_run_that_must_end_does_not_wait_for_the_ends(tmp_path):
    async def run():
        async with site(tmp_path, cuts=False) as on:
            for engine in on.engines:
                engine._token_s = 0.01  # so that the reply takes longer than a look at what is in flight
            asked = on.ask(400)
            await asyncio.sleep(0.05)
            on.sync._end_requested.set()
            await on.update(1)
            assert not asked.done()
            answers = [await asked]
            return answers, await on.spans_of(answers)

    answers, spans = asyncio.run(run())
    assert [version for version, _ in spans[0]] == [0, 1]
    check_spans(answers, spans)


@pytest.mark.parametrize(
    ("phase", "adapter"),
    [
        *((phase, False) for phase in ("pause", "collective_rpc", "reset_prefix_cache", "resume")),
        *((phase, True) for phase in ("unload_lora_adapter", "load_lora_adapter", "resume")),
    ],
)
def test_what_an_engine_had_answered_before_it_died_is_kept_and_another_one_goes_on(tmp_path, phase, adapter):
    async def run():
        async with site(tmp_path, adapter=adapter) as on:
            if adapter:
                await on.update(0)
            asked = [on.ask(150) for _ in range(8)]
            await asyncio.sleep(0.1)
            on.engines[1].dies_at = phase
            await on.update(1)
            answers = await asyncio.gather(*asked)
            return answers, await on.spans_of(answers), on, await on.stats()

    answers, spans, on, stats = asyncio.run(run())
    assert check_spans(answers, spans) == on.engines[0].given + on.engines[1].given
    assert {len(ids_of(answer)[1]) for answer in answers} == {150}
    assert (on.engines[1].given[0] > 0) == (phase != "pause"), "its pieces"
    assert stats["on_hold"] == [on.urls[1]]


def test_the_only_engine_that_dies_within_an_update_goes_on_with_the_pieces_once_it_is_back(tmp_path):
    async def run():
        async with site(tmp_path, num_engines=1) as on:
            asked = on.ask(150)
            await asyncio.sleep(0.1)
            on.engines[0].dies_at = "collective_rpc"
            await on.update(1)
            await on.tend()
            await asyncio.sleep(0.1)
            assert not asked.done()
            on.engines[0].come_back()
            await on.tend()
            answers = [await asked]
            return answers, await on.spans_of(answers)

    answers, spans = asyncio.run(run())
    assert [version for version, _ in spans[0]] == [0, 1]
    check_spans(answers, spans)


def test_a_request_that_arrives_behind_the_pause_is_cut_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_sync, "_ANSWER_S", 0.2)

    async def run():
        async with site(tmp_path, num_engines=1) as on:
            on.engines[0].late_s = 0.15
            asked = on.ask(5)
            await asyncio.sleep(0.05)
            await on.update(1)
            on.engines[0].late_s = 0.0
            return await on.spans_of([await asked]), on.engines[0]

    spans, engine = asyncio.run(run())
    assert spans == [[[1, 5]]] and engine.most_at_a_load == 0
    assert engine.requests[0] == engine.requests[1], "no token was done: the same draws"
    assert engine.hung_up == 0


def test_a_request_that_no_pause_ends_is_given_up_and_sent_again(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_sync, "_ANSWER_S", 0.1)

    async def run():
        async with site(tmp_path, num_engines=1) as on:
            on.engines[0].num_deaf = 1
            asked = [on.ask(5), on.ask(200)]
            await asyncio.sleep(0.1)
            began = time.monotonic()
            await on.update(1)
            seconds = time.monotonic() - began
            answers = await asyncio.gather(*asked)
            return answers, await on.spans_of(answers), on.engines[0], seconds

    answers, spans, engine, seconds = asyncio.run(run())
    assert seconds < 5 and engine.hung_up == 1
    assert spans[0] == [[1, 5]] and [version for version, _ in spans[1]] == [0, 1]
    check_spans(answers, spans)


def test_an_engine_that_was_started_anew_within_an_update_stays_on_hold(tmp_path):
    """The controller puts it on hold before it starts it; the end of the update must not open it."""

    async def run():
        async with site(tmp_path) as on:
            admission = on.sync._admission
            on.engines[1].late_s = 0.3
            update = asyncio.create_task(on.update(1))
            while not (await on.stats())["fenced"]:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(admission.hold, on.urls[1])
            await update
            held = await on.stats()
            await on.tend()
            return held, await on.stats(), on.urls

    held, after, urls = asyncio.run(run())
    assert held["on_hold"] == [urls[1]] and held["fenced"] == []
    assert after["on_hold"] == []


def test_without_an_adapter_nothing_samples_in_its_place(tmp_path):
    """Neither before the first update, nor in an engine that came back, whose model has no adapter."""

    async def run():
        async with site(tmp_path, num_engines=1, adapter=True) as on:
            [engine], [url] = on.engines, on.urls
            asked = on.ask(5)
            await asyncio.sleep(0.1)
            await on.tend()
            assert not asked.done() and engine.requests == [], "no update yet"
            await on.update(0)
            answers = [await asked]
            asked = on.ask(150)
            await asyncio.sleep(0.1)
            await asyncio.to_thread(on.sync._admission.hold, url)  # the controller starts it anew
            engine.is_dead = True
            engine._cut.set()
            engine._cut = asyncio.Event()
            await asyncio.sleep(0.1)
            engine.come_back()
            await asyncio.sleep(0.1)
            num_requests = len(engine.requests)
            await on.tend(None)  # the last version is in its file, whatever the trainer's weights are
            answers.append(await asked)
            return answers, await on.spans_of(answers), engine, num_requests

    answers, spans, engine, num_requests = asyncio.run(run())
    assert spans == [[[0, 5]], [[0, 150]]]
    check_spans(answers, spans)
    assert num_requests < len(engine.requests) and {sent["model"] for sent in engine.requests} == {"policy-0"}


def test_an_engine_that_has_lost_its_adapter_refuses_requests_and_the_answer_names_it(tmp_path):
    async def run():
        async with site(tmp_path, num_engines=1, adapter=True) as on:
            await on.update(3)
            on.engines[0].adapters = {}
            return await on.ask(5)

    status, body = asyncio.run(run())
    assert status == 500 and "404: " in body["error"]["message"]
    assert "The model `policy-3` does not exist" in body["error"]["message"]


def test_an_engine_that_lost_only_its_connection_gets_the_adapter_that_it_has_and_keeps_no_other(tmp_path):
    """vLLM refuses to load a name that it has."""

    async def run():
        async with site(tmp_path, adapter=True) as on:
            await on.update(1)
            await asyncio.to_thread(on.sync._admission.hold, on.urls[1])
            await on.tend(None)
            same = dict(on.engines[1].adapters)
            await asyncio.to_thread(on.sync._admission.hold, on.urls[1])
            await on.update(2)
            left = [path.name for path in (tmp_path / "weights").iterdir()]
            on.sync.close()
            return same, [engine.adapters for engine in on.engines], left, await on.stats()

    same, adapters, left, stats = asyncio.run(run())
    assert same == {"policy-1": 1}
    assert adapters == [{"policy-2": 2}] * 2 and stats["on_hold"] == []
    assert left == ["2"] and list(tmp_path.iterdir()) == [], "older versions are deleted, in the end all"


def test_an_adapter_that_an_engine_refuses_ends_the_update_with_its_words(tmp_path):
    async def run():
        async with site(tmp_path, num_engines=1, adapter=True) as on:
            on.engines[0].adapters = {"policy-1": 7}  # which nobody unloads
            await on.update(1)

    with pytest.raises(ServiceError, match=r"load_lora_adapter with 400: The lora adapter 'policy-1' has"):
        asyncio.run(run())
