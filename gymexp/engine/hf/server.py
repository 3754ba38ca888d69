"""HTTP server of the hf engine. Its route and format are vLLM's, so the gateway treats both engines alike.

    POST /inference/v1/generate   {"token_ids": [...], "sampling_params": {...}}
      -> {"choices": [{"token_ids", "logprobs": {"content": [{"logprob"}, ...]}, "finish_reason"}],
          "weights_versions": [[version, number of tokens], ...]}
    GET /health   GET /stats

`serve` runs it in the trainer's process, on a thread and an event loop of its own; `replica.py` runs it in a
process of its own. When a client hangs up, its request leaves the batch. The status is 400 if the request
breaks a rule and 500 if the engine failed, both with {"error": {"message"}}.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from gymexp.engine.hf.engine import HFEngine
from gymexp.engine.hf.sampling import SamplingParams
from gymexp.processes.access_keys import guard
from gymexp.rollout.generation import EngineError, answer_of

MAX_REQUEST_BYTES = 64 * 2**20

# Parameters that the engine does not support. It refuses any value but the one that changes nothing.
NEUTRAL_PARAMS = {
    "n": 1,
    "min_tokens": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "include_stop_str_in_output": True,
}
# Parameters that the engine ignores. It always returns the log-probabilities of the sampled tokens.
WITHOUT_EFFECT = {"logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens", "output_kind"}


@dataclass(frozen=True)
class ServerHandle:
    """A running server. `close` stops the server but not the engine."""

    url: str
    _loop: asyncio.AbstractEventLoop
    _stop: asyncio.Event
    _thread: threading.Thread

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()


def serve(
    engine: HFEngine,
    host: str = "127.0.0.1",
    port: int = 0,
    sock: socket.socket | None = None,
    key: str | None = None,
) -> ServerHandle:
    """Starts a server, and returns its handle once it listens. Raises OSError if it cannot listen.

    port: 0 for a free port, which is in the handle's url. sock: a listening socket to use in place of host
    and port. key: the key that every path demands; None for no key.
    """
    started: list[ServerHandle | BaseException] = []
    ready = threading.Event()

    async def run() -> None:
        app = build_app(engine)
        if key:
            app.middlewares.insert(0, guard(key))
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        try:
            await runner.setup()
            site = web.SockSite(runner, sock) if sock else web.TCPSite(runner, host, port)
            await site.start()
            stop = asyncio.Event()
            bound_host, bound_port = runner.addresses[0][:2]
            url = f"http://{bound_host}:{bound_port}"
            started.append(ServerHandle(url, asyncio.get_running_loop(), stop, threading.current_thread()))
            ready.set()
            await stop.wait()
        except BaseException as error:
            started.append(error)
            raise
        finally:
            ready.set()
            await runner.cleanup()

    def main() -> None:
        try:
            asyncio.run(run())
        except OSError as error:
            if started[0] is not error:
                raise

    threading.Thread(target=main, name="hf-server", daemon=True).start()
    ready.wait()
    if isinstance(started[0], BaseException):
        raise started[0]
    return started[0]


def build_app(engine: HFEngine) -> web.Application:
    """Returns the engine's HTTP application: vLLM's route for token ids, a health check and counts."""

    async def generate(request: web.Request) -> web.Response:
        try:
            token_ids, params = read_request(await request.read())
            future = engine.submit(token_ids, params)
        except (ValueError, TypeError) as error:
            return _error(400, str(error))
        except EngineError as error:
            return _error(500, str(error))
        try:
            # A hang-up cancels this handler, and so the future. The request then leaves the batch.
            generation = await asyncio.wrap_future(future)
        except EngineError as error:
            return _error(500, str(error))
        return _json(answer_of(generation))

    async def health(_: web.Request) -> web.Response:
        return _json({"status": "ok"}) if engine.alive else _error(503, "the hf engine is closed")

    async def stats(_: web.Request) -> web.Response:
        return _json(engine.stats())

    app = web.Application(client_max_size=MAX_REQUEST_BYTES)
    app.router.add_post("/inference/v1/generate", generate)
    app.router.add_get("/health", health)
    app.router.add_get("/stats", stats)
    return app


def read_request(body: bytes) -> tuple[list[int], SamplingParams]:
    """Returns token ids and sampling parameters of a request. Raises ValueError, which names the key, if the
    engine cannot carry out the request exactly.
    """
    request = orjson.loads(body)
    if not isinstance(request, dict):
        raise ValueError("the request must be a JSON object")
    token_ids = request.get("token_ids")
    if not isinstance(token_ids, list) or not all(type(token) is int for token in token_ids):
        raise ValueError("token_ids must be a list of integers")
    fields = request.get("sampling_params") or {}
    if not isinstance(fields, dict):
        raise ValueError("sampling_params must be a JSON object")
    return token_ids, build_params(fields)


def build_params(fields: dict[str, Any]) -> SamplingParams:
    """Returns the SamplingParams of a request's `sampling_params`. A null stands for the default.

    Raises ValueError, which names the key, if a value is not supported or has a wrong type.
    """
    params: dict[str, Any] = {}
    for key, value in fields.items():
        if value is None or key in WITHOUT_EFFECT or (key in NEUTRAL_PARAMS and value == NEUTRAL_PARAMS[key]):
            continue
        kinds = PARAM_KINDS.get(key)
        if kinds is None:
            neutral = f"; only {NEUTRAL_PARAMS[key]!r} is" if key in NEUTRAL_PARAMS else ""
            raise ValueError(f"sampling_params.{key}={value!r} is not supported by the hf engine{neutral}")
        if key == "stop" and isinstance(value, str):
            value = [value]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"sampling_params.{key} must be {names}, got {value!r}")
        params[key] = tuple(value) if isinstance(value, list) else value
    if params.get("top_k") == -1:  # stands for all tokens in vLLM, as 0 does
        params["top_k"] = 0
    item_kinds = {"stop": str, "stop_token_ids": int}
    for key, kind in item_kinds.items():
        if not all(isinstance(item, kind) for item in params.get(key, ())):
            raise ValueError(f"sampling_params.{key} must have {kind.__name__} only, got {fields[key]!r}")
    return SamplingParams(**params)


PARAM_KINDS: dict[str, tuple[type, ...]] = {
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "max_tokens": (int,),
    "seed": (int,),
    "stop": (list,),
    "stop_token_ids": (list,),
    "ignore_eos": (bool,),
}


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def _error(status: int, message: str) -> web.Response:
    return _json({"error": {"message": message, "code": status}}, status)
