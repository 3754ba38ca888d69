import asyncio
import json
import subprocess
import time
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from chat_tokenizers import build_tokenizer

from gymexp.policy.draws import call_seed
from gymexp.policy.gateway import GatewayConfig, build_app
from gymexp.policy.tokens import encode, render

TOKENIZER = build_tokenizer("qwen3")
END = "<|im_end|>"
TOOLS = [
    {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
]
CALL = '<tool_call>\n{"name": "search", "arguments": {"q": "東京"}}\n</tool_call>'
USER = [{"role": "user", "content": "Look up the mails."}]


class FakeEngine:
    """Answers with the scripted texts in turn, one log-probability a token. An entry may be a function."""

    def __init__(self, *script):
        self.script, self.requests, self.cancelled = list(script), [], asyncio.Event()
        self.ill = False

    async def generate(self, request):
        body = await request.json()
        self.requests.append(body)
        answer = self.script.pop(0)
        if callable(answer):
            try:
                return await answer()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        ids = encode(TOKENIZER, answer)[: body["sampling_params"]["max_tokens"]]
        content = [{"token_id": i, "logprob": -n / 8} for n, i in enumerate(ids)]
        ended = answer.endswith(END) and len(ids) == len(encode(TOKENIZER, answer))
        choice = {
            "token_ids": ids,
            "logprobs": {"content": content},
            "finish_reason": "stop" if ended else "length",
        }
        return web.json_response({"choices": [{"index": 0, **choice}], "weights_version": 3})

    @asynccontextmanager
    async def serve(self):
        app = web.Application()
        app.add_routes([web.post("/inference/v1/generate", self.generate), web.get("/health", self.health)])
        async with serve(app) as url:
            yield url

    async def health(self, request):
        return web.Response(status=503 if self.ill else 200)


@asynccontextmanager
async def serve(app):
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def gateway(*engine_urls, **config):
    config = {"max_model_len": 2000} | config
    async with (
        serve(build_app(GatewayConfig(engine_urls, **config), TOKENIZER)) as url,
        aiohttp.ClientSession(url) as http,
    ):
        yield http


async def chat(http, messages=USER, **fields):
    async with http.post(
        "/v1/chat/completions", json={"model": "policy", "messages": messages, **fields}
    ) as response:
        return response.status, await response.json()


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
        ({"n": 2}, "n must be 1 here, got 2"),
        ({"stream": True}, "stream must be False"),
        ({"top_k": 20}, "top_k must be 0 or -1"),
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

    texts = ["503: out of memory", "2 token_ids and 1 logprobs", "'abort'", "no choice", "within 0.5 s"]
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
            assert (await (await http.get("/stats")).json())["held"] == [url]
            assert (await http.post("/engine", json={"url": url, "open": True})).status == 200
            status, answer = await asyncio.wait_for(asked, 5)
            assert status == 200 and answer["choices"][0]["message"]["content"] == "one"
            await http.post("/engine", json={"url": url, "open": False})
            asked = asyncio.create_task(chat(http))
            await asyncio.sleep(0.2)
            assert not asked.done() and len(engine.requests) == 1
            asked.cancel()
            assert (await http.post("/engine", json={"url": "http://elsewhere", "open": True})).status == 400

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
                await http.post("/engine", json={"url": url, "open": True})
            status, answer = await chat(http)
            assert status == 200 and answer["choices"][0]["message"]["content"] == "from the other"
            assert dying.requests == other.requests, "the same ids and the same seed"
            assert (await (await http.get("/stats")).json())["held"] == sorted([gone, dying_url])

    asyncio.run(run())


def test_a_500_of_an_engine_that_is_well_is_the_requests_own():
    async def run():
        async def broken():
            return web.Response(status=500, text="this one alone")

        engine = FakeEngine(broken, "fine" + END)
        async with engine.serve() as url, gateway(url, hold=True) as http:
            await http.post("/engine", json={"url": url, "open": True})
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


def test_which_weights_sampled_a_rollout_is_what_its_engine_said():
    async def run():
        engine = FakeEngine("Grid" + END, "Grid" + END)
        async with engine.serve() as url, gateway(url) as http:
            await chat(http, seed=1, play="first")
            await chat(http, seed=1)
            async with http.post("/versions", json={"plays": ["first", "unheard of"]}) as response:
                return await response.json()

    assert asyncio.run(run()) == {"versions": [[3, 3], None]}


class SilentEngine(FakeEngine):
    """As vLLM up to 0.31: it does not say which weights sampled."""

    async def generate(self, request):
        answer = await super().generate(request)
        body = {k: v for k, v in json.loads(answer.body).items() if k != "weights_version"}
        return web.json_response(body)


def test_of_an_engine_that_says_no_version_it_is_what_was_sent_to_it_before_and_during_the_rollout():
    async def run():
        engine = SilentEngine(*["Grid" + END] * 4)
        async with engine.serve() as url, gateway(url, hold=True) as http:

            async def tell(**change):
                async with http.post("/engine", json={"url": url} | change) as response:
                    assert response.status == 200

            await tell(open=True, weights_version=4)
            await chat(http, seed=1, play="old")
            await chat(http, seed=1, play="both")
            await tell(weights_version=5)
            await chat(http, seed=2, play="both")
            await tell(open=False)
            await tell(weights_version=6)  # it went away while they were sent
            await tell(open=True)
            await chat(http, seed=3, play="unknown")
            async with http.post("/versions", json={"plays": ["old", "both", "unknown"]}) as response:
                return await response.json()

    assert asyncio.run(run()) == {"versions": [[4, 4], [4, 5], None]}


def test_a_generation_ends_at_the_tokens_that_the_gateway_was_told():
    _, _, [sent] = ask("Grid" + END, config={"stop_token_ids": (5, 7)})
    assert sent["sampling_params"]["stop_token_ids"] == [5, 7]
    _, _, [sent] = ask("Grid" + END)
    assert sent["sampling_params"]["stop_token_ids"] == [TOKENIZER.convert_tokens_to_ids(END)]


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
