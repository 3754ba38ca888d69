"""An engine whose tokens say which weights sampled them: version v samples the token id FIRST_ID + v."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web
from safetensors import safe_open
from safetensors.torch import load_file
from scripted_engine import serve

FIRST_ID = 40


class VersionedEngine:
    """Samples a token every token_s, up to max_tokens. It has the routes of a vLLM that an update uses.

    requests: those that it got. given: the number of tokens in its answers, by version. most_at_a_load: the
    most requests that were being sampled when weights were loaded. late_s: how long requests take to arrive.
    num_deaf: how many of the next requests hear neither a cut nor the end of a pause. dies_at: the phase of
    an update at which it breaks all connections. adapters: the version of each adapter that it has; it takes
    requests for these alone, but for requests that name none. Its answers about them are those of vLLM 0.31.
    """

    def __init__(self, token_s: float = 0.002) -> None:
        self.version = 0
        self.requests: list[dict] = []
        self.given = Counter[int]()
        self.most_at_a_load = 0
        self.late_s = 0.0
        self.num_deaf = 0
        self.dies_at = ""
        self.is_dead = False
        self.adapters: dict[str, int] = {}
        self.hung_up = 0
        self._token_s = token_s
        self._running = 0
        self._is_paused = False
        self._cut = asyncio.Event()

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        try:
            if self.num_deaf:
                self.num_deaf -= 1
                await asyncio.Event().wait()
            await asyncio.sleep(self.late_s)
        except asyncio.CancelledError:
            self.hung_up += 1
            raise
        if (name := body.get("model")) is not None and name not in self.adapters:
            error = {"message": f"The model `{name}` does not exist.", "type": "NotFoundError", "code": 404}
            return web.json_response({"error": error}, status=404)
        self._running += 1
        try:
            ids, reason = await self._sample(body["sampling_params"]["max_tokens"], name)
        finally:
            self._running -= 1
        if self.is_dead:
            return self._break_off(request)
        self.given.update(token - FIRST_ID for token in ids)
        content = [{"logprob": -len(ids[:i]) / 8} for i in range(len(ids))]
        choice = {"token_ids": ids, "logprobs": {"content": content}, "finish_reason": reason}
        return web.json_response({"choices": [choice]})

    async def _sample(self, limit: int, name: str | None) -> tuple[list[int], str]:
        cut, ids = self._cut, []
        while len(ids) < limit:
            await asyncio.sleep(self._token_s)
            if cut.is_set():
                return ids, "abort"
            if not self._is_paused:
                ids.append(FIRST_ID + (self.version if name is None else self.adapters[name]))
        return ids, "length"

    async def answer(self, request: web.Request) -> web.Response:
        phase = request.match_info["phase"]
        self.is_dead |= phase == self.dies_at
        if phase == "pause":
            assert request.query["mode"] == "abort"
            self._is_paused = True
            self._cut.set()
            self._cut = asyncio.Event()
        if self.is_dead:
            return self._break_off(request)
        if phase == "resume":
            self._is_paused = False
        if phase == "collective_rpc":
            path = Path((await request.json())["kwargs"]["weights_path"])
            with safe_open(path / "model.safetensors", "pt") as file:
                self.version = int(file.metadata()["weights_version"])
            self.most_at_a_load = max(self.most_at_a_load, self._running)
        if phase.endswith("_lora_adapter"):
            return self._change_adapters(phase, await request.json())
        return web.json_response({})

    def _change_adapters(self, phase: str, body: dict) -> web.Response:
        name = body["lora_name"]
        if phase == "unload_lora_adapter":
            known = self.adapters.pop(name, None) is not None
            return web.Response(status=200 if known else 404, text=f"Success: '{name}' removed.")
        if name in self.adapters:
            return web.Response(status=400, text=f"The lora adapter '{name}' has already been loaded.")
        [tensor] = load_file(Path(body["lora_path"]) / "adapter_model.safetensors").values()
        self.adapters[name] = int(tensor)
        self.most_at_a_load = max(self.most_at_a_load, self._running)
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.is_dead else 200)

    def come_back(self) -> None:
        """Is started again, with the weights of the run's start."""
        self.version, self.dies_at, self.is_dead, self._is_paused = 0, "", False, False
        self.adapters = {}

    @staticmethod
    def _break_off(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        app = web.Application()
        app.add_routes([web.post("/inference/v1/generate", self.generate), web.get("/health", self.health)])
        app.add_routes([web.post("/{phase}", self.answer), web.post("/v1/{phase}", self.answer)])
        async with serve(app) as url:
            yield url
