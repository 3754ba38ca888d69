"""The probe's canned replies, by way of the text gateway."""

from __future__ import annotations

import asyncio

import aiohttp
from scripted_engine import chat, serve

from gymexp.evaluation.request import REPLIES as PLAYED
from gymexp.gateway.probe import REPLIES, Probe
from gymexp.gateway.text_gateway import build_app


def test_each_reply_is_given_once_it_is_chosen_and_the_prompt_comes_back():
    async def run() -> dict[str, str]:
        said = {}
        async with serve(build_app(Probe())) as url, aiohttp.ClientSession(url) as http:
            for name in REPLIES:
                async with http.post("/probe", json={"reply": name}) as response:
                    assert response.status == 200
                messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "What is 1+1?"}]
                status, reply = await chat(http, messages)
                assert status == 200 and reply["choices"][0]["finish_reason"] == "stop"
                said[name] = reply["choices"][0]["message"]["content"]
            async with http.post("/probe", json={"reply": "no"}) as response:
                assert response.status == 400
        return said

    said = asyncio.run(run())
    assert said["empty"] == "" and said["yes"] == "yes" and said["prompt"] == "What is 1+1?"
    assert said["digits"].split() == [str(digit) for digit in range(10)] and "sorry" in said["refusal"]


def test_an_evaluation_plays_every_reply():
    assert tuple(REPLIES) == PLAYED
