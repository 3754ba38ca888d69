"""A gateway in front of an engine that says what a test tells it to."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web
from chat_tokenizers import build_tokenizer

from gymexp.gateway.server import GatewayConfig, build_app
from gymexp.rollout.tokens import encode

TOKENIZER = build_tokenizer("qwen3")


END = "<|im_end|>"


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
        return web.json_response({"choices": [{"index": 0, **choice}], "weights_versions": [[3, len(ids)]]})

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
