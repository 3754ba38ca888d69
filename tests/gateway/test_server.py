import asyncio
import copy
import json
import os
import subprocess
import sys
import time
from contextlib import AsyncExitStack

import aiohttp
import pytest
from aiohttp import web
from chat_tokenizers import build_tokenizer
from scripted_engine import CALL, END, TOKENIZER, USER, FakeEngine, chat, gateway, serve
from tokenizers import processors

from gymexp.gateway.server import GatewayConfig, build_app
from gymexp.rollout.draws import call_seed
from gymexp.rollout.tokens import encode, render

TOOLS = [
    {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
]


def ask(*script, messages=USER, config=None, **fields):
    """One request to a gateway in front of a fake engine: (status, answer, what the engine was sent)."""

    async def run():
        engine = FakeEngine(*script)
        async with engine.serve() as url, gateway(url, **(config or {})) as http:
            return *await chat(http, messages, **fields), engine.requests

    return asyncio.run(run())


def test_an_answer_has_openais_shape_and_carries_its_tokens():
    status, answer, [sent] = ask(
        "Grid: 1 2" + END, temperature=0.5, top_p=0.9, seed=7, max_tokens=50, stop="STOP", logprobs=True
    )
    generation_ids = encode(TOKENIZER, "Grid: 1 2" + END)
    prompt_ids = encode(TOKENIZER, render(TOKENIZER, USER))
    assert status == 200
    assert answer["object"] == "chat.completion" and answer["model"] == "policy"
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"] == {
        "role": "assistant",
        "content": "Grid: 1 2",
        "prompt_token_ids": prompt_ids,
        "generation_token_ids": generation_ids,
        "generation_log_probs": [-n / 8 for n in range(len(generation_ids))],
    }
    assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == choice["message"][
        "generation_log_probs"
    ]
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == "Grid: 1 2" + END
    num = len(prompt_ids), len(generation_ids)
    assert answer["usage"] == {"prompt_tokens": num[0], "completion_tokens": num[1], "total_tokens": sum(num)}
    assert sent["token_ids"] == prompt_ids
    assert sent["sampling_params"] == {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": call_seed(7, prompt_ids),
        "max_tokens": 50,
        "stop": ["STOP"],
        "stop_token_ids": [TOKENIZER.eos_token_id],
        "logprobs": 0,
    }


def test_vllms_own_sampling_parameters_reach_the_engine_as_they_were_given():
    status, _, [sent] = ask(
        "Yes." + END, temperature=0, top_k=20, min_p=0.05, repetition_penalty=1.1, max_tokens=9
    )
    assert status == 200
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    assert [sent["sampling_params"].get(name) for name in names] == [0, 1.0, 20, 0.05, 1.1]


def test_turns_with_tool_results_continue_the_very_ids_that_were_sampled():
    # Not as the tokenizer would write this text: letter by letter. And the template drops the reasoning.
    letters = [i for letter in "<think>hm</think>" for i in encode(TOKENIZER, letter)]

    async def spelt():
        ids = letters + encode(TOKENIZER, CALL + CALL + END)
        content = [{"logprob": -1.0}] * len(ids)
        choice = {"token_ids": ids, "logprobs": {"content": content}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice]})

    async def run():
        engine = FakeEngine(spelt, "cut by le", "Done." + END)
        async with engine.serve() as url, gateway(url) as http:
            messages, turns = list(USER), []
            for _ in range(3):
                status, answer = await chat(http, messages, tools=TOOLS)
                assert status == 200, answer
                message = answer["choices"][0]["message"]
                turns.append((answer["choices"][0]["finish_reason"], message))
                results = [
                    {"role": "tool", "tool_call_id": call["id"], "content": "none"}
                    for call in message.get("tool_calls", [])
                ]
                messages += [message, *(results or [{"role": "user", "content": "Go on."}])]
            return turns, engine.requests

    turns, requests = asyncio.run(run())
    (reason_0, first), (reason_1, second), (reason_2, third) = turns
    assert (reason_0, reason_1, reason_2) == ("tool_calls", "length", "stop")
    assert [json.loads(call["function"]["arguments"]) for call in first["tool_calls"]] == [{"q": "東京"}] * 2
    assert len({call["id"] for call in first["tool_calls"]}) == 2
    after_calls = "\n<|im_start|>user" + "\n<tool_response>\nnone\n</tool_response>" * 2 + "<|im_end|>\n"
    assert second["prompt_token_ids"] == [
        *first["prompt_token_ids"],
        *first["generation_token_ids"],
        *encode(TOKENIZER, after_calls + "<|im_start|>assistant\n"),
    ]
    assert third["prompt_token_ids"] == [
        *second["prompt_token_ids"],
        *second["generation_token_ids"],
        *encode(TOKENIZER, "<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"),
    ]
    assert [request["token_ids"] for request in requests] == [m["prompt_token_ids"] for _, m in turns]


@pytest.mark.parametrize(
    ("said", "fields", "content", "reasoning", "names"),
    [
        ("<think>\nhm\n</think>\n\nfine" + END, {}, "fine", "hm", []),
        ("<think>\nhm", {}, "", "hm", []),
        ("I look. " + CALL + END, {"tools": TOOLS}, "I look.", None, ["search"]),
        (CALL + "\n" + CALL + END, {"tools": TOOLS}, None, None, ["search", "search"]),
        (CALL + "\n" + CALL + END, {"tools": TOOLS, "parallel_tool_calls": False}, None, None, ["search"]),
        (CALL + END, {"tools": TOOLS, "tool_choice": "none"}, CALL, None, []),
        (CALL + END, {}, CALL, None, []),
        ("a STOP b" + END, {"stop": ["STOP", "b"]}, "a ", None, []),
        (" spaces stay \n" + END, {"tools": TOOLS}, " spaces stay \n", None, []),
    ],
)
def test_the_environment_gets_text_reasoning_and_calls_apart(said, fields, content, reasoning, names):
    status, answer, _ = ask(said, **fields)
    message = answer["choices"][0]["message"]
    assert status == 200
    assert message["content"] == content
    assert message.get("reasoning_content") == reasoning
    assert [call["function"]["name"] for call in message.get("tool_calls", [])] == names
    assert message["generation_token_ids"] == encode(TOKENIZER, said)


@pytest.mark.parametrize(
    "call",
    [
        "<tool_call>\n{not json}\n</tool_call>",
        '<tool_call>{"name": "search", "arguments": {"q": 1}}',
        '<tool_call>{"name": "search", "arguments": "text"}</tool_call>',
        '<tool_call>{"name": "search", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "search", "arguments": {"q": NaN}}</tool_call>',
        '<tool_call>{"name": "search", "arguments": {"q": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "search"}</tool_call>',
        '<tool_call>{"name": ["search"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "verify", "arguments": {}}</tool_call>',
        "<tool_call>[]</tool_call>",
        "<tool_call>" + "[" * 900 + "</tool_call>",
        "<tool_call>" + "[" * 3000 + "]" * 3000 + "</tool_call>",
        "</tool_call><tool_call></tool_call>",
        CALL + "<tool_call>{</tool_call>",
    ],
)
def test_a_malformed_call_is_content(call):
    status, answer, _ = ask(call + END, tools=TOOLS, config={"max_model_len": 20_000})
    message = answer["choices"][0]["message"]
    assert status == 200
    assert "tool_calls" not in message
    assert message["content"] == call
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"n": 2}, "n must be 1 for this gateway, got 2"),
        ({"stream": True}, "stream must be False"),
        ({"top_k": -2}, "top_k must be an integer >= 1, or 0 or -1 for all tokens, got -2"),
        ({"top_k": 2.5}, "top_k must be an integer"),
        ({"min_p": "x"}, "min_p must be a number >= 0"),
        ({"repetition_penalty": -1}, "repetition_penalty must be a number >= 0"),
        ({"presence_penalty": 0.5}, "presence_penalty must be 0"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice must be 'auto' or 'none'"),
        ({"temperature": "hot"}, "temperature must be a number >= 0, got 'hot'"),
        ({"max_completion_tokens": 0}, "max_completion_tokens must be an integer >= 1"),
        ({"stop": [1]}, "stop must be"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "assistant", "generation_token_ids": [1]}]}, "no prompt_token_ids"),
        ({"messages": [{"role": "user", "content": 7}]}, "content must be text, got int"),
    ],
)
def test_a_wrong_request_is_a_400_that_says_what_is_wrong(fields, text):
    status, answer, sent = ask(**fields)
    assert (status, sent) == (400, [])
    assert text in answer["error"]["message"]
    # NeMo Gym would take these for a prompt that is too long, and hide the mistake.
    assert (
        "context length" not in answer["error"]["message"] and "max_tokens" not in answer["error"]["message"]
    )


def test_a_prompt_that_fills_the_context_is_a_400_that_nemo_gym_understands():
    num_tokens = len(encode(TOKENIZER, render(TOKENIZER, USER)))
    status, answer, _ = ask("x", config={"max_model_len": num_tokens})
    assert status == 400 and "maximum context length" in answer["error"]["message"]
    status, answer, [sent] = ask("far too long", config={"max_model_len": num_tokens + 2}, max_tokens=50)
    assert status == 200 and answer["choices"][0]["finish_reason"] == "length"
    assert sent["sampling_params"]["max_tokens"] == 2


def test_an_engine_that_is_away_or_ill_is_a_500_at_once_that_names_it():
    async def broken():
        return web.Response(status=503, text="out of memory")

    async def short():
        choice = {"token_ids": [1, 2], "logprobs": {"content": [{"logprob": 0}]}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice]})

    async def aborted():
        choice = {"token_ids": [1], "logprobs": {"content": [{"logprob": 0}]}, "finish_reason": "abort"}
        return web.json_response({"choices": [choice]})

    async def empty():
        return web.json_response({})

    async def slow():
        await asyncio.sleep(30)

    texts = [
        "503: out of memory",
        "2 token_ids and 1 logprobs",
        "cut a generation",
        "no choice",
        "within 0.5 s",
    ]
    for fault, text in zip((broken, short, aborted, empty, slow), texts, strict=True):
        status, answer, _ = ask(fault, config={"engine_timeout_s": 0.5})
        assert (
            status == 500 and answer["error"]["type"] == "engine_error" and text in answer["error"]["message"]
        )

    async def away():
        async with gateway("http://127.0.0.1:9") as http:
            started = time.perf_counter()
            status, answer = await chat(http)
            health = (await http.get("/health")).status
            return status, answer["error"]["message"], health, time.perf_counter() - started

    status, message, health, seconds = asyncio.run(away())
    assert status == 500 and "engine http://127.0.0.1:9" in message
    assert health == 503 and seconds < 5


def test_a_held_engine_gets_nothing_until_it_is_opened_and_nothing_more_once_it_is_gone():
    async def run():
        engine = FakeEngine("one" + END, "two" + END)
        async with engine.serve() as url, gateway(url, hold=True) as http:
            asked = asyncio.create_task(chat(http))
            await asyncio.sleep(0.2)
            assert not asked.done() and engine.requests == []
            assert (await (await http.get("/stats")).json())["on_hold"] == [url]
            assert (await http.post("/engine", json={"urls": [url], "state": "open"})).status == 200
            status, answer = await asyncio.wait_for(asked, 5)
            assert status == 200 and answer["choices"][0]["message"]["content"] == "one"
            held = await http.post("/engine", json={"urls": [url], "state": "on_hold"})
            assert await held.json() == {"on_hold": [url]}
            asked = asyncio.create_task(chat(http))
            await asyncio.sleep(0.2)
            assert not asked.done() and len(engine.requests) == 1
            asked.cancel()
            elsewhere = {"urls": ["http://elsewhere"], "state": "open"}
            assert (await http.post("/engine", json=elsewhere)).status == 400
            assert (await http.post("/engine", json={"urls": [url], "state": "closed"})).status == 400

    asyncio.run(run())


def test_a_request_whose_engine_goes_away_is_answered_by_another_and_only_time_is_lost():
    async def run():
        async def die():
            dying.ill = True
            return web.Response(status=500)

        gone, dying, other = "http://127.0.0.1:9", FakeEngine(die), FakeEngine("from the other" + END)
        async with (
            dying.serve() as dying_url,
            other.serve() as other_url,
            gateway(gone, dying_url, other_url, hold=True) as http,
        ):
            for url in (gone, dying_url, other_url):
                await http.post("/engine", json={"urls": [url], "state": "open"})
            status, answer = await chat(http)
            assert status == 200 and answer["choices"][0]["message"]["content"] == "from the other"
            assert dying.requests == other.requests, "the same ids and the same seed"
            assert (await (await http.get("/stats")).json())["on_hold"] == sorted([gone, dying_url])

    asyncio.run(run())


def test_a_500_of_an_engine_that_is_well_is_the_requests_own():
    async def run():
        async def broken():
            return web.Response(status=500, text="this one alone")

        engine = FakeEngine(broken, "fine" + END)
        async with engine.serve() as url, gateway(url, hold=True) as http:
            await http.post("/engine", json={"urls": [url], "state": "open"})
            status, answer = await chat(http)
            assert status == 500 and "this one alone" in answer["error"]["message"]
            assert (await chat(http))[0] == 200

    asyncio.run(run())


def test_what_an_engine_refuses_is_a_400():
    async def refuse():
        return web.Response(status=400, text="maximum context length is 7")

    status, answer, _ = ask(refuse)
    assert status == 400 and "maximum context length is 7" in answer["error"]["message"]


def test_a_client_that_hangs_up_cancels_its_generation():
    async def run():
        started = asyncio.Event()

        async def forever():
            started.set()
            await asyncio.sleep(60)

        engine = FakeEngine(forever)
        async with engine.serve() as url, gateway(url) as http:
            request = asyncio.create_task(chat(http))
            await started.wait()
            request.cancel()
            await asyncio.wait_for(engine.cancelled.wait(), 5)
            stats = await (await http.get("/stats")).json()
            assert stats["in_flight"] == 0 and list(stats["engines"].values()) == [0]

    asyncio.run(run())


def test_first_turns_go_to_the_least_busy_replica_and_later_turns_to_the_same():
    async def run():
        async def slow(text):
            await asyncio.sleep(0.2)
            ids = encode(TOKENIZER, text)
            content = [{"logprob": -1.0}] * len(ids)
            choice = {"token_ids": ids, "logprobs": {"content": content}, "finish_reason": "stop"}
            return web.json_response({"choices": [choice]})

        def script(name):
            return [lambda n=n: slow(f"{name} {n}{END}") for n in range(8)]

        engines = [FakeEngine(*script("a")), FakeEngine(*script("b"))]
        async with engines[0].serve() as a, engines[1].serve() as b, gateway(a, b) as http:

            async def play():
                messages, names = list(USER), []
                for _ in range(4):
                    _, answer = await chat(http, messages)
                    message = answer["choices"][0]["message"]
                    names.append(message["content"][0])
                    messages += [message, {"role": "user", "content": "Go on."}]
                return "".join(names)

            return await asyncio.gather(play(), play())

    assert sorted(asyncio.run(run())) == ["aaaa", "bbbb"]


def test_tokenize_models_and_health_answer_as_vllm_does():
    async def run():
        async with FakeEngine().serve() as url, gateway(url) as http:
            async with http.post("/tokenize", json={"messages": USER, "tools": TOOLS}) as response:
                rendered = await response.json()
            async with http.post("/tokenize", json={"prompt": "user\n"}) as response:
                plain = await response.json()
            models = await (await http.get("/v1/models")).json()
            return rendered, plain, models, (await http.get("/health")).status

    rendered, plain, models, health = asyncio.run(run())
    ids = encode(TOKENIZER, render(TOKENIZER, USER, TOOLS))
    assert rendered == {"count": len(ids), "max_model_len": 2000, "tokens": ids}
    assert plain["tokens"] == encode(TOKENIZER, "user\n")
    assert models["data"][0]["id"] == "policy" and health == 200


def test_first_turn_prompts_are_rendered_once_for_a_group():
    async def run():
        async with FakeEngine(*["x" + END] * 4).serve() as url, gateway(url) as http:
            for seed in range(3):
                await chat(http, seed=seed)
            await chat(http, chat_template_kwargs={"enable_thinking": False})
            return await (await http.get("/stats")).json()

    stats = asyncio.run(run())
    assert (stats["requests"], stats["cached_prompts"]) == (4, 2)


NEMO_GYM_ROUND_TRIP = """
import json, sys
from nemo_gym.openai_utils import NeMoGymChatCompletion, NeMoGymResponseCreateParamsNonStreaming
from nemo_gym.responses_converter import VLLMConverter

for completion, results in json.load(sys.stdin):
    converter = VLLMConverter(return_token_id_information=True, uses_reasoning_parser=True)
    message = completion["choices"][0]["message"]
    if reasoning := message.pop("reasoning_content", None):  # as responses_api_models/vllm_model does
        message["content"] = f"<think>{reasoning}</think>" + (message["content"] or "")
    choice = NeMoGymChatCompletion.model_validate(completion).choices[0]
    output = [item.model_dump() for item in converter.postprocess_chat_response(choice)]
    items = [{"role": "user", "content": "Look up the mails."}, *output]
    items += [
        {"type": "function_call_output", "call_id": item["call_id"], "output": results}
        for item in output
        if item["type"] == "function_call"
    ]
    params = NeMoGymResponseCreateParamsNonStreaming(input=items)
    again = converter.responses_to_chat_completion_create_params(params)
    print("RESULT" + json.dumps(again.model_dump(exclude_unset=True)))
"""


@pytest.mark.gym
def test_ids_survive_nemo_gyms_own_conversion(tmp_path, gym_python):
    (tmp_path / "round_trip.py").write_text(NEMO_GYM_ROUND_TRIP)
    replies = ("<think>\nhm\n</think>\n\nI look. " + CALL + CALL + END, CALL + END, "Plain.")

    async def run():
        async with AsyncExitStack() as stack:
            clients = []
            for said in replies:
                url = await stack.enter_async_context(FakeEngine(said, "Done." + END).serve())
                clients.append(await stack.enter_async_context(gateway(url)))
            options = {"tools": TOOLS, "logprobs": True, "return_tokens_as_token_ids": True}
            firsts = [(await chat(http, **options))[1] for http in clients]
            assert all(first["choices"][0]["logprobs"] is None for first in firsts)
            process = subprocess.run(
                [gym_python, tmp_path / "round_trip.py"],
                input=json.dumps([[first, "two mails"] for first in firsts]),
                capture_output=True,
                text=True,
                cwd=tmp_path,
            )
            assert process.returncode == 0, process.stderr
            again = [json.loads(line) for line in process.stdout.split("RESULT")[1:]]
            seconds = [
                (await chat(http, tools=TOOLS, **one))[1] for http, one in zip(clients, again, strict=True)
            ]
            return [[answer["choices"][0]["message"] for answer in some] for some in (firsts, seconds)]

    for first, second in zip(*asyncio.run(run()), strict=True):
        before = first["prompt_token_ids"] + first["generation_token_ids"]
        assert second["prompt_token_ids"][: len(before)] == before
        tail = TOKENIZER.decode(second["prompt_token_ids"][len(before) :])
        results = "\n<tool_response>\ntwo mails\n</tool_response>" * len(first.get("tool_calls", []))
        expected = f"\n<|im_start|>user{results}<|im_end|>\n" if results else "<|im_end|>\n"
        assert tail == expected + "<|im_start|>assistant\n"


def versions_in(answer: dict) -> list:
    """The weights of each attempt, with seconds that were measured."""
    assert all(one is None or 0 < one["seconds"] < 10 for one in answer["attempts"])
    return [one and list(one["versions"].values()) for one in answer["attempts"]]


def test_which_weights_sampled_a_rollout_is_what_its_engine_said():
    async def run():
        engine = FakeEngine("Grid" + END, "Grid" + END)
        async with engine.serve() as url, gateway(url) as http:
            await chat(http, seed=1, play="first")
            await chat(http, seed=1)
            async with http.post("/attempts", json={"plays": ["first", "unheard of"]}) as response:
                return await response.json()

    assert versions_in(asyncio.run(run())) == [[[[3, len(encode(TOKENIZER, "Grid" + END))]]], None]


class SilentEngine(FakeEngine):
    """As vLLM up to 0.31: it does not say which weights sampled."""

    async def generate(self, request):
        answer = await super().generate(request)
        body = {k: v for k, v in json.loads(answer.body).items() if k != "weights_versions"}
        return web.json_response(body)


def test_of_an_engine_that_says_no_version_it_is_what_was_sent_to_it_last():
    async def run():
        engine = SilentEngine("Grid" + END, "One" + END, "Two three" + END, "Grid" + END)
        async with engine.serve() as url, gateway(url, hold=True) as http:

            async def tell(**change):
                async with http.post("/engine", json={"urls": [url]} | change) as response:
                    assert response.status == 200

            await tell(state="open", weights_version=4)
            await chat(http, seed=1, play="old")
            await chat(http, seed=1, play="both")
            await tell(state="updated", weights_version=5)
            await chat(http, seed=2, play="both")
            await tell(state="on_hold")
            await tell(state="updated", weights_version=6)  # it went away while they were sent
            await tell(state="open")
            await chat(http, seed=3, play="unknown")
            async with http.post("/attempts", json={"plays": ["old", "both", "unknown"]}) as response:
                return await response.json()

    grid, one, two = (len(encode(TOKENIZER, text + END)) for text in ("Grid", "One", "Two three"))
    assert versions_in(asyncio.run(run())) == [[[[4, grid]]], [[[4, one]], [[5, two]]], []]


def test_a_generation_ends_at_the_tokens_that_the_gateway_was_told():
    _, _, [sent] = ask("Grid" + END, config={"stop_token_ids": (5, 7)})
    assert sent["sampling_params"]["stop_token_ids"] == [5, 7]
    _, _, [sent] = ask("Grid" + END)
    assert sent["sampling_params"]["stop_token_ids"] == [TOKENIZER.convert_tokens_to_ids(END)]


def test_other_tools_template_options_or_no_generation_prompt_make_another_prompt_of_the_same_messages():
    other = [{"type": "function", "function": {"name": "delete", "parameters": {}}}]
    requests = [
        {},
        {"tools": TOOLS},
        {"tools": other},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"add_generation_prompt": False},
    ]

    async def run():
        engine = FakeEngine(*["x" + END] * 10)
        async with engine.serve() as url, gateway(url) as http:
            for fields in requests * 2:
                assert (await chat(http, **fields))[0] == 200
            stats = await (await http.get("/stats")).json()
        return [TOKENIZER.decode(sent["token_ids"]) for sent in engine.requests], stats

    prompts, stats = asyncio.run(run())
    assert len(set(prompts)) == 5 and prompts[:5] == prompts[5:] and stats["cached_prompts"] == 5
    plain, with_tools, with_others, no_thought, no_start = prompts[:5]
    user = "<|im_start|>user\nLook up the mails.<|im_end|>\n"
    assert plain == user + "<|im_start|>assistant\n" and no_start == user
    assert '"search"' in with_tools and '"delete"' in with_others and '"search"' not in with_others
    assert no_thought == plain + "<think>\n\n</think>\n\n"


def test_cached_prompts_are_bounded_and_the_least_recently_used_goes_first(monkeypatch):
    monkeypatch.setattr("gymexp.gateway.server.CACHED_PROMPTS", 2)

    async def run():
        async with FakeEngine(*["x" + END] * 6).serve() as url, gateway(url) as http:
            cached = []
            for text in ("a", "b", "a", "c", "a", "b"):
                await chat(http, [{"role": "user", "content": text}])
                cached.append((await (await http.get("/stats")).json())["cached_prompts"])
            return cached

    assert asyncio.run(run()) == [0, 0, 1, 1, 2, 2]


def test_stats_count_requests_tokens_seconds_and_errors():
    async def slow():
        await asyncio.sleep(0.1)
        return web.Response(status=500, text="broken")

    async def run():
        engine = FakeEngine("one two" + END, slow)
        async with engine.serve() as url, gateway(url) as http:
            fresh = await (await http.get("/stats")).json()
            await chat(http)
            await chat(http)
            await http.post("/v1/chat/completions", data=b"not json")
            return url, fresh, await (await http.get("/stats")).json(), engine.requests

    url, fresh, stats, (first, _) = asyncio.run(run())
    empty = dict.fromkeys(("requests", "in_flight", "prompt_tokens", "generation_tokens", "seconds"), 0)
    held = {"engines": {url: 0}, "cuts": 0, "on_hold": [], "untold": [], "fenced": []}
    assert fresh == empty | {"errors": 0, "cached_prompts": 0} | held
    assert 0.1 <= stats.pop("seconds") < 5
    assert stats == {
        "requests": 3,
        "in_flight": 0,
        "prompt_tokens": len(first["token_ids"]),
        "generation_tokens": len(encode(TOKENIZER, "one two" + END)),
        "errors": 2,
        "cached_prompts": 1,
        **held,
    }


def test_its_other_routes_answer_in_openais_and_vllms_shape_and_refuse_what_they_do_not_know():
    async def run():
        engine = FakeEngine("x" + END)
        async with engine.serve() as url, gateway(url, model_name="mine", max_model_len=77) as http:
            models = await (await http.get("/v1/models")).json()
            well = await (await http.get("/health")).json()
            engine.ill = True
            ill = await http.get("/health")
            refused = [
                await http.post(path, json=body)
                for path, body in (
                    ("/attempts", {}),
                    ("/attempts", {"plays": "x"}),
                    ("/attempts", {"plays": [1]}),
                    ("/engine", {"urls": [url], "state": "yes"}),
                    ("/engine", {}),
                    ("/engine", {"urls": ["http://elsewhere"], "state": "open"}),
                    ("/drain", {"urls": [url], "timeout_s": True, "cut": False}),
                    ("/drain", {"urls": [url], "timeout_s": 1}),
                    ("/drain", {"urls": ["http://elsewhere"], "timeout_s": 1, "cut": False}),
                    ("/tokenize", {"messages": "x"}),
                    ("/tokenize", {"messages": [1]}),
                )
            ]
            answers = [(one.status, await one.json()) for one in refused]
            return url, models, well, (ill.status, await ill.json()), answers

    url, models, well, (status, ill), answers = asyncio.run(run())
    assert models == {
        "object": "list",
        "data": [{"id": "mine", "object": "model", "created": 0, "owned_by": "gymexp", "max_model_len": 77}],
    }
    assert well == {"ill": {}} and status == 503 and url in ill["ill"]
    for status, answer in answers:
        assert (status, answer["error"]["code"], answer["error"]["type"]) == (
            400,
            400,
            "invalid_request_error",
        )
    texts = [answer["error"]["message"] for _, answer in answers]
    assert texts[0] == texts[1] == texts[2] == "plays must be a list of texts"
    assert texts[3] == "state must be one of open, fenced, updated, on_hold, got 'yes'"
    assert texts[4] == "urls must be a list of texts, got None"
    assert texts[5] == texts[8] == f"urls must be some of {url}, got 'http://elsewhere'"
    assert texts[6:8] == ["timeout_s must be a number >= 0, got True", "cut must be a boolean, got None"]
    assert texts[9] == texts[10] == "messages must be a list of at least one object"


def test_errors_have_openais_shape_and_are_never_those_that_nemo_gym_repeats_for_ever():
    async def broken():
        return web.Response(status=503, text="out of memory")

    status, answer, _ = ask(broken)
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (500, "engine_error", 500)

    async def refuse():
        return web.Response(status=400, text="no")

    status, answer, _ = ask(refuse)
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (400, "invalid_request_error", 400)


def test_an_attempt_has_the_versions_of_each_of_its_turns_and_the_older_ones_of_equal_turns():
    def says(version, text="x"):
        async def answer():
            ids = encode(TOKENIZER, text + END)
            content = [{"logprob": -1.0}] * len(ids)
            choice = {"token_ids": ids, "logprobs": {"content": content}, "finish_reason": "stop"}
            return web.json_response({"choices": [choice], "weights_versions": [[version, len(ids)]]})

        return answer

    async def run():
        engine = FakeEngine(says(5), says(3), says(7, "y z"), says(6), says(6))
        async with engine.serve() as url, gateway(url) as http:
            for play in ("a", "a", "a", "b", None):
                await chat(http, seed=1, play=play)
            async with http.post("/attempts", json={"plays": ["a", "b", "none"]}) as response:
                return await response.json()

    x, y = len(encode(TOKENIZER, "x" + END)), len(encode(TOKENIZER, "y z" + END))
    assert versions_in(asyncio.run(run())) == [[[[3, x]], [[7, y]]], [[[6, x]]], None]


def test_plain_text_is_tokenized_with_the_special_tokens_that_the_tokenizer_adds_unless_asked_not_to():
    tokenizer = with_beginning()
    begin = tokenizer.convert_tokens_to_ids("<think>")

    async def run():
        app = build_app(GatewayConfig(("http://127.0.0.1:9",)), tokenizer)
        async with serve(app) as url, aiohttp.ClientSession(url) as http:
            bodies = [{"prompt": "user"}, {"prompt": "user", "add_special_tokens": False}, {"messages": USER}]
            return [await (await http.post("/tokenize", json=body)).json() for body in bodies]

    answers = asyncio.run(run())
    assert {answer["max_model_len"] for answer in answers} == {None}, "the gateway was told none"
    added, bare, rendered = (answer["tokens"] for answer in answers)
    assert added == [begin, *bare]
    assert begin not in rendered, "the template has written what the prompt begins with"


def test_a_request_may_have_megabytes_as_a_long_conversation_with_all_its_ids_has():
    """aiohttp's own limit is one."""

    async def run():
        async with (
            gateway("http://127.0.0.1:9") as http,
            http.post("/attempts", json={"plays": ["x" * (1 << 23)]}) as response,
        ):
            return response.status, await response.json()

    assert asyncio.run(run()) == (200, {"attempts": [None]})


def with_beginning():
    """A tokenizer that puts a token before every text, as Llama's and Gemma's do."""
    tokenizer = copy.deepcopy(build_tokenizer("plain"))
    begin = tokenizer.convert_tokens_to_ids("<think>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<think> $A", special_tokens=[("<think>", begin)]
    )
    return tokenizer


def test_a_calls_texts_are_given_where_openais_own_logprobs_are_asked_for():
    _, answer, _ = ask("a b" + END, logprobs=True, return_tokens_as_token_ids=True)
    assert answer["choices"][0]["logprobs"] is None, "NeMo Gym has the ids on the message"
    _, answer, _ = ask("a b" + END)
    assert answer["choices"][0]["logprobs"] is None
    _, answer, _ = ask("a b" + END, logprobs=True)
    texts = [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert "".join(texts) == "a b" + END and len(texts) > 1


LOAD = """
import os, sys
from gymexp.errors import ConfigError
from gymexp.gateway.server import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
assert sys.modules.get("torch") is None and tokenizer.chat_template
assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
try:
    load_tokenizer(sys.argv[2])
except ConfigError as end:
    assert f"a chat template, got {sys.argv[2]!r}, which has none" in str(end), end
    print("ok")
"""


def test_the_tokenizer_is_loaded_without_torch_and_must_have_a_chat_template(tmp_path):
    bare = copy.deepcopy(TOKENIZER)
    TOKENIZER.save_pretrained(tmp_path / "with")
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "without")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "with", tmp_path / "without"],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"},
    )
    assert (done.stdout, done.stderr) == ("ok\n", ""), "nothing of what it warns of"


def test_an_engine_that_was_started_anew_under_a_request_is_asked_again_once_it_has_the_policys_weights():
    """The request waits in the socket that the new process inherits: weights of the run's start answer."""
    waiting, answered = asyncio.Event(), asyncio.Event()

    async def old_weights():
        waiting.set()
        await answered.wait()
        ids = encode(TOKENIZER, "wrong" + END)
        content = [{"token_id": i, "logprob": -0.5} for i in ids]
        choice = {"token_ids": ids, "logprobs": {"content": content}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "weights_versions": [[0, len(ids)]]})

    async def run():
        engine = FakeEngine(old_weights, "Grid" + END)
        async with engine.serve() as url, gateway(url, hold=True) as http:

            async def tell(**change):
                async with http.post("/engine", json={"urls": [url]} | change) as response:
                    assert response.status == 200

            await tell(state="open", weights_version=1)
            asked = asyncio.create_task(chat(http, seed=1, play="p"))
            await asyncio.wait_for(waiting.wait(), 5)
            await tell(state="on_hold")  # the supervisor, before it starts the engine anew
            answered.set()
            await asyncio.sleep(0.2)
            assert not asked.done(), "what the new process said is not taken"
            await tell(state="open", weights_version=1)
            status, answer = await asyncio.wait_for(asked, 5)
            return status, answer["choices"][0]["message"]["content"], engine.requests

    status, content, requests = asyncio.run(run())
    assert (status, content) == (200, "Grid")
    assert requests[0] == requests[1], "the same ids and the same seed"


def test_tools_whose_calls_nothing_reads_are_refused_before_anything_is_sampled():
    """An agent may offer the policy tools that no row has."""

    async def run():
        engine = FakeEngine("fine" + END)
        app = lambda url: build_app(GatewayConfig((url,), max_model_len=500), build_tokenizer("plain"))  # noqa: E731
        async with engine.serve() as at, serve(app(at)) as url, aiohttp.ClientSession(url) as http:
            refused, answer = await chat(http, tools=TOOLS)
            assert not engine.requests
            accepted, _ = await chat(http, tools=TOOLS, tool_choice="none")
            return refused, answer["error"]["message"], accepted

    refused, message, accepted = asyncio.run(run())
    assert (refused, accepted) == (400, 200) and "response_template" in message
