"""Serves the policy as an OpenAI-compatible endpoint, in front of engines that take and return token ids.

    python -m gymexp.gateway.server --engine-url http://127.0.0.1:8001 --tokenizer PATH --port 8000

The environment must have three keys (`gymexp.processes.access_keys`). GYMEXP_RUN_KEY opens every path,
GYMEXP_POLICY_KEY opens the paths that NeMo Gym uses, and the gateway sends GYMEXP_ENGINE_KEY to the engines.

The message of each reply carries `prompt_token_ids`, `generation_token_ids` and `generation_log_probs`. NeMo
Gym sends them back on the next turn, whose prompt then continues exactly those ids (`tokens.splice`). An
engine is any server with vLLM's `POST /inference/v1/generate` and `GET /health`.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from gymexp.engine.admission import Drain, EngineChange, EngineState
from gymexp.errors import ConfigError, TokenMismatch
from gymexp.gateway import chat
from gymexp.gateway.engines import EngineRefusal, Engines
from gymexp.gateway.history import Conversation, History
from gymexp.gateway.serving import guard_of_environment, serve
from gymexp.policy.model import check_tokenizer, end_token_ids
from gymexp.printable import log_to_stderr
from gymexp.processes.parent_watch import die_with_parent
from gymexp.processes.ports import adopt, listen, url_of
from gymexp.rollout import tokens
from gymexp.rollout.attempts import Attempts, turn_key
from gymexp.rollout.draws import CallSeeds
from gymexp.rollout.generation import EngineError, Generation

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 28
_MAX_REASON = 1000  # characters of why an engine failed, in a header
CACHED_PROMPTS = 2048
NO_CALLS = (
    "tools must be left out: gymexp cannot read the calls that this policy's chat template writes. "
    "Describe their format in its tokenizer_config.json, as response_template"
)


@dataclass(frozen=True)
class GatewayConfig:
    """The gateway's options.

    max_model_len: of prompt + generation, in tokens; None for no limit. engine_timeout_s: for one generation,
    including the wait for an engine. hold: whether an engine gets requests only after `POST /engine` opens
    it, and none after it goes away. stop_token_ids: ids that end a generation; None for those of the
    tokenizer and its chat template. adapter: whether the engines sample with the adapter that requests name.
    is_one_of_several: whether other gateways have the same engines.
    """

    engine_urls: tuple[str, ...]
    model_name: str = "policy"
    max_model_len: int | None = None
    engine_timeout_s: float = 1800.0
    hold: bool = False
    stop_token_ids: tuple[int, ...] | None = None
    adapter: bool = False
    is_one_of_several: bool = False


class Gateway:
    """The gateway's routes, and their common state: tokenizer, parser, engines, cached first prompts,
    counts.
    """

    def __init__(self, config: GatewayConfig, tokenizer: Any):
        self.config = config
        self.tokenizer = tokenizer
        # Imported late: it imports transformers, which must come after `load_tokenizer` has kept torch out.
        from gymexp.gateway.reply import ReplyParser

        self.history = History(tokenizer)
        self.parser = ReplyParser(tokenizer)
        stops = config.stop_token_ids
        self.stop_token_ids = tokens.end_of_turn_ids(tokenizer) if stops is None else list(stops)
        decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
        self.engines = Engines(
            config.engine_urls,
            config.engine_timeout_s,
            config.hold,
            decode,
            config.adapter,
            config.is_one_of_several,
        )
        self.prompts: OrderedDict[bytes, list[int]] = OrderedDict()
        self.seeds = CallSeeds()
        self.attempts = Attempts()
        self.stats: dict[str, float] = dict.fromkeys(
            (
                "requests",
                "in_flight",
                "prompt_tokens",
                "generation_tokens",
                "seconds",
                "errors",
                "cached_prompts",
            ),
            0,
        )

    async def chat_completions(self, request: web.Request) -> web.Response:
        """Answers a chat request, and counts it in `stats`."""
        started = time.perf_counter()
        self.stats["requests"] += 1
        self.stats["in_flight"] += 1
        try:
            answer = await self._complete(chat.read_object(await request.read()))
        except BaseException:
            self.stats["errors"] += 1
            raise
        finally:
            self.stats["in_flight"] -= 1
            self.stats["seconds"] += time.perf_counter() - started
        return json_response(answer)

    async def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        stop, conversation, prompt_ids, continues = self.read(body)
        sampling_params = chat.sampling_params(body, len(prompt_ids), self.config.max_model_len)
        sampling_params["stop_token_ids"] = self.stop_token_ids
        generation = await self._sample(body, prompt_ids, sampling_params, continues)
        self.stats["prompt_tokens"] += len(prompt_ids)
        self.stats["generation_tokens"] += len(generation.token_ids)
        tools = None if body.get("tool_choice") == "none" else body.get("tools")
        parallel = body.get("parallel_tool_calls") is not False
        reply = self.parser.parse(generation.token_ids, prompt_ids, tools, parallel, stop)
        self.history.remember(conversation, prompt_ids, generation.token_ids, reply)
        # A client that wants ids in place of token texts (NeMo Gym) finds them on the message. A second copy
        # would double the cost.
        wants_texts = body.get("logprobs") and not body.get("return_tokens_as_token_ids")
        texts = [self.tokenizer.decode([i]) for i in generation.token_ids] if wants_texts else None
        return chat.completion(self.config.model_name, prompt_ids, generation, reply, texts)

    def read(self, body: dict[str, Any]) -> tuple[list[str], Conversation, list[int], int]:
        """Returns (stop strings, conversation, the ids of its prompt, how many of these ids are the previous
        turn's prompt and generation).

        Raises BadRequest or TokenMismatch if the request must be answered with 400.
        """
        chat.check_neutral(body)
        if body.get("tools") and body.get("tool_choice") != "none" and not self.parser.reads_calls:
            raise chat.BadRequest(NO_CALLS)
        stop = chat.read_stop(body)
        conversation = read_conversation(body)
        return stop, conversation, *self.prompt_ids(conversation)

    async def _sample(
        self, body: dict[str, Any], prompt_ids: list[int], sampling_params: dict[str, Any], continues: int
    ) -> Generation:
        if (rollout_seed := sampling_params.get("seed")) is None:
            return await self.engines.generate(prompt_ids, sampling_params, continues)
        # A rollout's seed alone would repeat the same draws in every turn: each call gets a seed of its own.
        play = chat.read_play(body)
        started = time.perf_counter()
        with self.seeds.take(play, rollout_seed, prompt_ids) as seed:
            generation = await self.engines.generate(prompt_ids, sampling_params | {"seed": seed}, continues)
        if play is not None:
            key = turn_key(prompt_ids, generation.token_ids)
            self.attempts.add_turn(play, time.perf_counter() - started, key, generation.versions)
        return generation

    def prompt_ids(self, conversation: Conversation) -> tuple[list[int], int]:
        """Returns (ids of the prompt, how many of them are the previous turn's prompt and generation; 0 in a
        first turn). Raises BadRequest, TokenMismatch.
        """
        try:
            if (index := tokens.last_sampled(conversation.messages)) is not None:
                self.history.verify(conversation)
                sampled = conversation.messages[index]
                ids = conversation.prompt_ids(self.tokenizer)
                return ids, len(sampled["prompt_token_ids"]) + len(sampled["generation_token_ids"])
            key = conversation.key()
            if (ids := self.prompts.pop(key, None)) is None:
                ids = conversation.prompt_ids(self.tokenizer)
            else:
                self.stats["cached_prompts"] += 1
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise chat.BadRequest(f"messages or tools: {type(error).__name__}: {error}") from error
        self.prompts[key] = ids
        if len(self.prompts) > CACHED_PROMPTS:
            self.prompts.popitem(last=False)
        return ids, 0

    async def tokenize(self, request: web.Request) -> web.Response:
        """Answers vLLM's `/tokenize`: the ids of a `prompt`, or of a conversation's prompt."""
        body = chat.read_object(await request.read())
        if isinstance(prompt := body.get("prompt"), str):
            ids = self.tokenizer.encode(prompt, add_special_tokens=body.get("add_special_tokens", True))
        else:
            ids, _ = self.prompt_ids(read_conversation(body))
        return json_response({"count": len(ids), "max_model_len": self.config.max_model_len, "tokens": ids})

    async def models(self, request: web.Request) -> web.Response:
        model = {"id": self.config.model_name, "object": "model", "created": 0, "owned_by": "gymexp"}
        return json_response(
            {"object": "list", "data": [model | {"max_model_len": self.config.max_model_len}]}
        )

    async def health(self, request: web.Request) -> web.Response:
        ill = await self.engines.ill()
        return json_response({"ill": ill}, status=503 if ill else 200)

    async def read_stats(self, request: web.Request) -> web.Response:
        engines = self.engines
        held = {name: sorted(getattr(engines, name)) for name in ("on_hold", "untold", "fenced")}
        counts = {"engines": engines.in_flight, "cuts": engines.num_cuts, "load": engines.load.totals()}
        return json_response(self.stats | counts | held)

    async def read_attempts(self, request: web.Request) -> web.Response:
        """Takes {"plays": [names of attempts]}. Answers {"attempts": […]}: for each name what is known of its
        `Attempt`, or null if the attempt is not known.
        """
        plays = chat.read_object(await request.read()).get("plays")
        if not isinstance(plays, list) or not all(isinstance(play, str) for play in plays):
            raise chat.BadRequest("plays must be a list of texts")
        return json_response(self.attempts.answer(plays))

    async def change_engine(self, request: web.Request) -> web.Response:
        """Takes an `EngineChange` and answers with the engines on hold."""
        try:
            change = EngineChange.read(chat.read_object(await request.read()))
        except ValueError as error:
            raise chat.BadRequest(str(error)) from None
        self._check_urls(change.urls)
        match change.state:
            case EngineState.OPEN:
                for url in change.urls:
                    self.engines.open(url, change.weights_version)
            case EngineState.FENCED:
                self.engines.fence(change.urls)
            case EngineState.UPDATED:
                self.engines.updated(change.urls, change.weights_version)
            case EngineState.ON_HOLD:
                for url in change.urls:
                    self.engines.hold(url)
        return json_response({"on_hold": sorted(self.engines.on_hold)})

    async def drain(self, request: web.Request) -> web.Response:
        """Takes a `Drain`, and answers once no request is in flight at its engines, or at its timeout."""
        try:
            drain = Drain.read(chat.read_object(await request.read()))
        except ValueError as error:
            raise chat.BadRequest(str(error)) from None
        self._check_urls(drain.urls)
        left = await self.engines.drain(drain.urls, drain.timeout_s, drain.cut)
        return json_response({"in_flight": left})

    def _check_urls(self, urls: Sequence[str]) -> None:
        if unknown := [url for url in urls if url not in self.engines.in_flight]:
            known = " ".join(self.engines.in_flight)
            raise chat.BadRequest(f"urls must be some of {known}, got {unknown[0]!r}")


def read_conversation(body: dict[str, Any]) -> Conversation:
    """Returns the fields of a chat request that decide its prompt. Raises BadRequest."""
    messages, with_prompt = body.get("messages"), body.get("add_generation_prompt", True)
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise chat.BadRequest("messages must be a list of at least one object")
    return Conversation(
        messages, body.get("tools") or None, body.get("chat_template_kwargs") or {}, with_prompt
    )


def build_app(config: GatewayConfig, tokenizer: Any) -> web.Application:
    """Returns the gateway's application. Serve it with `handler_cancellation=True`: only then does a client
    that hangs up cancel its generation.
    """
    gateway = Gateway(config, tokenizer)
    app = web.Application(middlewares=[answer_errors], client_max_size=MAX_BODY_BYTES)
    app.cleanup_ctx.append(gateway.engines.connect)
    app.add_routes(
        [
            web.post("/v1/chat/completions", gateway.chat_completions),
            web.post("/tokenize", gateway.tokenize),
            web.get("/v1/models", gateway.models),
            web.get("/health", gateway.health),
            web.get("/stats", gateway.read_stats),
            web.post("/engine", gateway.change_engine),
            web.post("/drain", gateway.drain),
            web.post("/attempts", gateway.read_attempts),
        ]
    )
    return app


@web.middleware
async def answer_errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """Turns exceptions into errors of OpenAI's format. The status is never 429, 502, 503 or 504, as NeMo Gym
    would repeat such a request for ever.
    """
    try:
        return await handler(request)
    except (chat.BadRequest, EngineRefusal) as error:
        return error_response(400, "invalid_request_error", str(error))
    except TokenMismatch as error:
        return error_response(400, "token_mismatch", str(error))
    except EngineError as error:
        log.warning("%s", error)
        response = error_response(500, "engine_error", str(error))
        # NeMo Gym repeats a 500 and loses its body; its servers pass this on (`gym/rollout_calls.py`).
        said = {"server": "gateway", "said": str(error)[:_MAX_REASON], "cause": "engine"}
        response.headers["x-gymexp-failed"] = json.dumps(said)
        return response


def json_response(value: Any, status: int = 200) -> web.Response:
    """Returns a JSON response, written by orjson, which is several times faster on lists of tokens."""
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def error_response(status: int, kind: str, message: str) -> web.Response:
    """Returns an error response in the format of OpenAI's API."""
    return json_response({"error": {"message": message, "type": kind, "code": status}}, status)


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """Loads the tokenizer without torch, which takes 3 s and 300 MB to import and which this process does not
    need. Does not affect torch if it is imported already.

    Raises ConfigError if the tokenizer lacks what gymexp needs (`model.check_tokenizer`).
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` raise ImportError
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would warn that torch is missing
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # with one text at a time threads only cost
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    check_tokenizer(tokenizer, Path(directory))
    return tokenizer


def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m gymexp.gateway.server", allow_abbrev=False)
    parser.add_argument("--engine-url", action="append", required=True, help="once for each replica")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the model's directory")
    at = parser.add_mutually_exclusive_group(required=True)
    at.add_argument("--port", type=int)
    at.add_argument("--fd", type=int, help="an open listening socket, handed down by the parent")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--model-name", default=GatewayConfig.model_name)
    parser.add_argument("--max-model-len", type=int, help="prompt + generation, in tokens")
    parser.add_argument("--engine-timeout-s", type=float, default=GatewayConfig.engine_timeout_s)
    parser.add_argument(
        "--hold", action="store_true", help="no requests for an engine until POST /engine opens it"
    )
    parser.add_argument("--adapter", action="store_true", help="requests name the policy's adapter")
    parser.add_argument(
        "--one-of-several", action="store_true", help="other gateways send requests to the same engines"
    )
    args = parser.parse_args()
    log_to_stderr()
    guard = guard_of_environment()
    try:
        tokenizer = load_tokenizer(args.tokenizer)
    except ConfigError as error:
        raise SystemExit(f"--tokenizer: {error}") from None
    config = GatewayConfig(
        tuple(args.engine_url),
        args.model_name,
        args.max_model_len,
        args.engine_timeout_s,
        args.hold,
        tuple(end_token_ids(tokenizer, args.tokenizer)),
        args.adapter,
        args.one_of_several,
    )
    sock = listen(args.host, args.port, "--port") if args.fd is None else adopt(args.fd)
    log.info("gateway on %s, engines %s", url_of(sock), " ".join(config.engine_urls))
    serve(build_app(config, tokenizer), sock, guard)


if __name__ == "__main__":
    main()
