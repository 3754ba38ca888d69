"""The text gateway in front of an endpoint that answers what a test tells it to, over real HTTP."""

from __future__ import annotations

import asyncio
import email.utils
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from scripted_engine import chat, serve

from gymexp.gateway import endpoint as endpoint_module
from gymexp.gateway.endpoint import Endpoint
from gymexp.gateway.reply_check import checked_calls
from gymexp.gateway.text_gateway import build_app

KEY = "somebody-elses-key-91"
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
HELLO = {"role": "assistant", "content": "hello"}


def completion(message: dict[str, Any] = HELLO, **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage} | more


def call(name: str = "search", arguments: str = '{"q": 1}') -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


class Script:
    """Answers with the entries in turn: a reply, or (status, text, headers), or a coroutine function."""

    def __init__(self, *entries: Any) -> None:
        self.entries, self.bodies, self.headers, self.at = list(entries), [], [], []

    async def answer(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        self.at.append(time.monotonic())
        entry = self.entries.pop(0)
        if callable(entry):
            entry = await entry()
        if isinstance(entry, dict):
            return web.json_response(entry)
        status, text, *headers = entry
        return web.Response(status=status, text=text, headers=headers[0] if headers else None)


@asynccontextmanager
async def gateway(
    script: Script, timeout_s: float = 5.0, key: str | None = KEY
) -> AsyncIterator[aiohttp.ClientSession]:
    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", script.answer)])
    async with (
        serve(app) as url,
        serve(build_app(Endpoint(f"{url}/v1", "their/model", key, timeout_s))) as own,
        aiohttp.ClientSession(own) as http,
    ):
        yield http


def ask(script: Script, *, timeout_s: float = 5.0, key: str | None = KEY, **fields: Any) -> tuple[int, Any]:
    """The gateway's answer to one chat request."""

    async def run() -> tuple[int, Any]:
        async with gateway(script, timeout_s, key) as http:
            return await chat(http, **fields)

    return asyncio.run(run())


def test_the_endpoint_gets_openais_fields_alone_and_nemo_gym_its_reply():
    script = Script(completion())
    history = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho", "prompt_token_ids": [1], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "found"},
    ]
    sampling = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 30, "top_k": 5}
    ours = {"logprobs": True, "return_tokens_as_token_ids": True, "play": "p1", "seed": 4, "metadata": {}}
    status, reply = ask(script, messages=history, tools=[TOOL], **sampling, **ours)
    assert status == 200
    [sent] = script.bodies
    seed = sent.pop("seed")
    assert sent == sampling | {
        "model": "their/model",
        "tools": [TOOL],
        "messages": [history[0], {"role": "assistant", "content": "ho"}, history[2]],
    }
    assert type(seed) is int and 0 <= seed < 2**31
    assert script.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert reply["choices"][0]["message"] == HELLO
    assert reply["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


def test_without_a_key_no_header_is_sent():
    script = Script(completion())
    assert ask(script, key=None)[0] == 200
    assert "Authorization" not in script.headers[0]


def test_a_rollouts_turns_have_seeds_of_their_own_which_a_repetition_gets_again():
    async def run() -> list[int]:
        script = Script(*[completion()] * 4)
        async with gateway(script) as http:
            for play in ("a", "b"):
                first = [{"role": "user", "content": "hi"}]
                await chat(http, first, seed=3, play=play)
                await chat(http, [*first, HELLO, {"role": "user", "content": "and?"}], seed=3, play=play)
        return [body["seed"] for body in script.bodies]

    first, second, *again = asyncio.run(run())
    assert first != second and [first, second] == again


@pytest.mark.parametrize("as_date", [False, True])
def test_all_requests_wait_as_long_as_a_429_asks(as_date):
    wait = email.utils.format_datetime(
        email.utils.localtime() + __import__("datetime").timedelta(seconds=2)
    ) if as_date else "1"  # fmt: skip

    async def run() -> list[float]:
        script = Script((429, "slowly", {"Retry-After": wait}), completion(), completion())
        async with gateway(script) as http:
            first = asyncio.create_task(chat(http))
            while not script.at:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            second = asyncio.create_task(chat(http))
            assert [status for status, _ in await asyncio.gather(first, second)] == [200, 200]
        return [at - script.at[0] for at in script.at[1:]]

    waits = asyncio.run(run())
    assert min(waits) >= (0.5 if as_date else 0.95), "a date has whole seconds"


def test_a_wait_beyond_the_deadline_is_not_waited_for():
    began = time.monotonic()
    status, reply = ask(Script((429, "tomorrow", {"Retry-After": "3600"})), timeout_s=2)
    assert status == 500 and reply["error"]["type"] == "engine_error"
    assert "429: tomorrow, and asks to wait 36" in reply["error"]["message"]
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("passing", [(500, "oops"), (503, "busy"), (200, "<html>"), (529, "overloaded")])
def test_what_passes_is_tried_again(passing):
    script = Script(passing, completion())
    assert ask(script)[1]["choices"][0]["message"] == HELLO
    assert len(script.bodies) == 2


def test_what_does_not_pass_ends_at_the_deadline_with_the_last_reason():
    async def never() -> dict:
        await asyncio.sleep(60)
        return completion()

    began = time.monotonic()
    status, reply = ask(Script((502, "bad gateway"), never), timeout_s=1.5)
    assert status == 500 and reply["error"]["type"] == "engine_error"
    assert "no reply within endpoint.timeout_s=1.5: the request was not answered" in reply["error"]["message"]
    assert time.monotonic() - began < 4


def test_an_endpoint_that_is_gone_is_waited_for_once_and_asked_as_before_when_it_is_back():
    async def run() -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}/v1"
        found = []
        async with (
            serve(build_app(Endpoint(url, "m", None, 2.0))) as own,
            aiohttp.ClientSession(own) as http,
        ):
            for _ in range(3):
                began = time.monotonic()
                status, reply = await chat(http)
                found.append((status, reply["error"]["message"], time.monotonic() - began))
            script = Script(completion(), (503, "busy"), completion())
            app = web.Application()
            app.add_routes([web.post("/v1/chat/completions", script.answer)])
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            found += [(await chat(http))[0] for _ in range(2)]
            await runner.cleanup()
        return [url, *found]

    url, first, second, third, *back = asyncio.run(run())
    assert 1.5 < first[2] < 6 and second[2] < 1 and third[2] < 1
    for status, message, _ in (first, second, third):
        assert status == 500 and message.startswith(f"endpoint.url={url}: ") and "Cannot connect" in message
    assert back == [200, 200], "what passes is tried again"


def test_an_endpoint_that_answers_nothing_is_waited_for_by_one_request_at_a_time_until_it_answers():
    async def run() -> list[Any]:
        released = asyncio.Event()

        async def held() -> dict:
            await released.wait()
            return completion()

        async def asked(http: aiohttp.ClientSession) -> tuple[int, str, float]:
            began = time.monotonic()
            status, reply = await chat(http)
            return status, "" if status == 200 else reply["error"]["message"], time.monotonic() - began

        script = Script(*[held] * 20)
        async with gateway(script, timeout_s=1.5) as http:
            first = await asyncio.gather(*(asked(http) for _ in range(3)))
            probe = asyncio.create_task(asked(http))
            await asyncio.sleep(0.3)
            meanwhile = await asyncio.gather(*(asked(http) for _ in range(5)))
            num_asked = len(script.bodies)
            released.set()
            back = [await probe, *await asyncio.gather(*(asked(http) for _ in range(5)))]
        return [first, meanwhile, num_asked, back]

    first, meanwhile, num_asked, back = asyncio.run(run())
    assert all(status == 500 and seconds > 1.2 for status, _, seconds in first)
    assert all(status == 500 and seconds < 0.5 for status, _, seconds in meanwhile)
    assert all(re.search(r"no request was answered for \d+ s, and one still waits", m[1]) for m in meanwhile)
    assert num_asked == 4
    assert [status for status, _, _ in back] == [200] * 6


def test_a_request_without_a_reply_makes_no_endpoint_silent_that_answers_others():
    async def never() -> dict:
        await asyncio.sleep(60)
        return completion()

    async def run() -> list[int]:
        async with gateway(Script(never, *[completion()] * 9), timeout_s=1.0) as http:
            lost = asyncio.create_task(chat(http))
            await asyncio.sleep(0.3)
            answered = await chat(http)
            lost_status = (await lost)[0]
            return [
                answered[0],
                lost_status,
                *[s for s, _ in await asyncio.gather(*(chat(http) for _ in "abc"))],
            ]

    assert asyncio.run(run()) == [200, 500, 200, 200, 200]


def test_a_broken_connection_is_tried_again():
    async def run() -> tuple[int, Any]:
        script = Script(completion())
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", script.answer)])
        async with serve(app) as url:
            pass  # nobody listens there any more
        policy = Endpoint(f"{url}/v1", "m", None, 1.0)
        async with serve(build_app(policy)) as own, aiohttp.ClientSession(own) as http:
            return await chat(http)

    status, reply = asyncio.run(run())
    assert status == 500 and "ClientConnector" in reply["error"]["message"]


def test_a_limit_that_the_context_has_no_room_for_does_not_end_the_rollout():
    """vLLM 0.26 refuses such a request, though the prompt fits, and the rollout would count as cut off."""
    text = (
        "This model's maximum context length is 1024 tokens. However, you requested 1024 output tokens "
        "and your prompt contains at least 70 input tokens, for a total of at least 1094 tokens."
    )
    script = Script((400, text), completion())
    status, reply = ask(script, max_tokens=1024)
    assert status == 200 and reply["choices"][0]["message"]["content"] == "hello"
    assert script.bodies[0]["max_tokens"] == 1024 and "max_tokens" not in script.bodies[1]
    script = Script((400, text), (400, text))
    assert ask(script, max_tokens=1024)[0] == 400 and not script.entries


def test_a_prompt_that_is_too_long_is_told_in_words_that_nemo_gym_knows():
    status, reply = ask(
        Script((400, '{"error": {"code": "context_length_exceeded", "message": "too much"}}'))
    )
    assert status == 400 and "context length" in reply["error"]["message"]


@pytest.mark.parametrize("text", ["max_tokens must be smaller", "unknown field seed"])
def test_another_refusal_is_an_error_and_never_taken_for_a_long_prompt(text):
    status, reply = ask(Script((400, text)))
    assert status == 500 and reply["error"]["type"] == "engine_error"
    assert "max_tokens" not in reply["error"]["message"] and "context length" not in reply["error"]["message"]


def test_a_model_that_knows_the_newer_name_of_the_limit_gets_it_from_then_on():
    newer = (400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")

    async def run() -> Script:
        script = Script(newer, completion(), completion())
        async with gateway(script) as http:
            assert [(await chat(http, max_tokens=9))[0] for _ in range(2)] == [200, 200]
        return script

    bodies = asyncio.run(run()).bodies
    assert [body.get("max_completion_tokens") for body in bodies] == [None, 9, 9]
    assert "max_tokens" not in bodies[2]


def test_a_redirect_is_not_followed_as_another_host_would_get_the_key():
    script = Script((307, "", {"Location": "/v1/chat/completions"}))
    status, reply = ask(script)
    assert status == 500 and "307" in reply["error"]["message"] and len(script.bodies) == 1


def test_the_key_is_taken_out_of_every_answer():
    status, reply = ask(Script((418, f"no tea for {KEY}")))
    assert status == 500 and "no tea for ***" in reply["error"]["message"]
    _, reply = ask(Script(completion({"role": "assistant", "content": f"you are {KEY}"})))
    assert reply["choices"][0]["message"]["content"] == "you are ***"


@pytest.mark.parametrize(
    "reply", [{}, {"choices": []}, {"choices": [{"message": {"content": 3}}]}, {"a": None}]
)
def test_what_is_no_completion_is_an_error_that_names_the_endpoint(reply):
    status, answer = ask(Script(reply))
    assert status == 500 and "endpoint.url=" in answer["error"]["message"]


def test_tool_calls_go_on_and_reasoning_too():
    message = {"role": "assistant", "content": None, "tool_calls": [call()], "reasoning": "look it up"}
    _, reply = ask(Script(completion(message)), tools=[TOOL])
    found = reply["choices"][0]["message"]
    assert found["tool_calls"] == [call()] and found["content"] is None
    assert found["reasoning_content"] == "look it up"


@pytest.mark.parametrize("bad", [call("verify"), call(arguments="[1]"), call(arguments="{"), {"id": "x"}])
def test_a_call_of_no_tool_or_without_an_object_is_plain_text(bad):
    _, reply = ask(
        Script(completion({"role": "assistant", "content": "so: ", "tool_calls": [bad]})), tools=[TOOL]
    )
    found = reply["choices"][0]["message"]
    assert "tool_calls" not in found and found["content"].startswith("so: [{")


def test_only_the_first_of_parallel_calls_is_kept_where_the_row_wants_one():
    assert len(checked_calls([call(), call()], [TOOL], parallel=True)) == 2
    assert len(checked_calls([call(), call()], [TOOL], parallel=False)) == 1


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((401, "bad key"), "answered 401"),
        ((404, "no such model"), "answered 404"),
        ((400, "too few tokens"), ""),
        (completion(), ""),
    ],
)
def test_the_check_before_an_evaluation_knows_what_is_hopeless(answer, told):
    async def run() -> str:
        async with gateway(Script(answer)) as http, http.post("/check", json={}) as response:
            return (await response.json())["problem"]

    problem = asyncio.run(run())
    assert told in problem and bool(told) == bool(problem)
    if told:
        assert "endpoint.model=their/model" in problem and KEY not in problem


def test_the_gateway_tells_the_usage_and_the_turns_of_an_attempt():
    async def run() -> Any:
        script = Script(completion(), completion(usage=None))
        async with gateway(script) as http:
            await chat(http, play="p")
            await chat(http, play="q")
            async with http.post("/attempts", json={"plays": ["p", "q", "r"]}) as response:
                return [one and one["usage"] for one in (await response.json())["attempts"]]

    assert asyncio.run(run()) == [
        {"turns": 1, "prompt_tokens": 7, "completion_tokens": 2},
        {"turns": 1},
        None,
    ]


def test_a_proxy_of_the_environment_is_not_for_this_machine():
    assert endpoint_module._is_loopback("127.0.0.1") and endpoint_module._is_loopback("localhost")
    assert not endpoint_module._is_loopback("api.example.org")
