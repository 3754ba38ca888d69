"""The gateway of an evaluation whose policy answers with text alone: no token ids, no training.

    python -m gymexp.gateway.text_gateway --url …/v1 --model NAME --key-env VARIABLE --fd N
    python -m gymexp.gateway.text_gateway --probe --fd N

The policy is somebody's endpoint (`endpoint.py`) or a set of canned replies (`probe.py`). NeMo Gym and the
collector use the same routes as those of `server.py`, and the same keys guard them. Besides, with the run's
key:

    POST /check   answers {"problem": why no request to the policy can succeed, or ""}
    POST /probe   {"reply": NAME} chooses the probe's reply

This process alone uses the endpoint's key, which it reads from the variable that --key-env names.
"""

from __future__ import annotations

import argparse
import logging
import time

from aiohttp import web

from gymexp.gateway import chat
from gymexp.gateway.endpoint import Endpoint
from gymexp.gateway.probe import Probe
from gymexp.gateway.server import MAX_BODY_BYTES, answer_errors, json_response
from gymexp.gateway.serving import guard_of_environment, serve
from gymexp.gateway.text_policy import TextPolicy
from gymexp.printable import log_to_stderr
from gymexp.processes import access_keys
from gymexp.processes.parent_watch import die_with_parent
from gymexp.processes.ports import adopt, url_of
from gymexp.rollout.attempts import Attempts
from gymexp.rollout.draws import CallSeeds

log = logging.getLogger(__name__)
_MODEL = "policy"


class TextGateway:
    """The gateway's routes, in front of `policy`."""

    def __init__(self, policy: TextPolicy) -> None:
        self._policy = policy
        self._attempts = Attempts()
        self._seeds = CallSeeds()

    async def chat_completions(self, request: web.Request) -> web.Response:
        """Answers a chat request. Each call of a rollout has a seed of its own, as with gymexp's engines."""
        body = chat.read_object(await request.read())
        play, rollout_seed = chat.read_play(body), body.get("seed")
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise chat.BadRequest("messages must be a list of objects")
        started = time.perf_counter()
        if type(rollout_seed) is int:
            # Without token ids, the number of messages tells a rollout's turns apart.
            with self._seeds.take(play, rollout_seed, [len(messages)]) as seed:
                answer = await self._policy.answer(body | {"seed": seed})
        else:
            answer = await self._policy.answer(body)
        if play is not None:
            usage = {"turns": 1} | answer.usage
            self._attempts.add_turn(play, time.perf_counter() - started, usage=usage)
        return json_response(answer.to_json(_MODEL))

    async def models(self, request: web.Request) -> web.Response:
        """Answers OpenAI's list of models."""
        model = {"id": _MODEL, "object": "model", "created": 0, "owned_by": "gymexp"}
        return json_response({"object": "list", "data": [model]})

    async def health(self, request: web.Request) -> web.Response:
        """Answers 200: the gateway itself is well."""
        return json_response({"ill": {}})

    async def read_attempts(self, request: web.Request) -> web.Response:
        """Answers what `server.Gateway.read_attempts` does."""
        plays = chat.read_object(await request.read()).get("plays")
        if not isinstance(plays, list) or not all(isinstance(play, str) for play in plays):
            raise chat.BadRequest("plays must be a list of texts")
        return json_response(self._attempts.answer(plays))

    async def check(self, request: web.Request) -> web.Response:
        """Answers {"problem": text}."""
        return json_response({"problem": await self._policy.problem()})

    async def choose(self, request: web.Request) -> web.Response:
        """Takes {"reply": name} for the probe."""
        if not isinstance(self._policy, Probe):
            raise chat.BadRequest("this policy is no probe")
        self._policy.choose(chat.read_object(await request.read()).get("reply"))
        return json_response({})


def build_app(policy: TextPolicy) -> web.Application:
    """Returns the gateway's application. Serve it with `handler_cancellation=True`."""
    gateway = TextGateway(policy)
    app = web.Application(middlewares=[answer_errors], client_max_size=MAX_BODY_BYTES)
    if isinstance(policy, Endpoint):
        app.cleanup_ctx.append(policy.connect)
    app.add_routes(
        [
            web.post("/v1/chat/completions", gateway.chat_completions),
            web.get("/v1/models", gateway.models),
            web.get("/health", gateway.health),
            web.post("/attempts", gateway.read_attempts),
            web.post("/check", gateway.check),
            web.post("/probe", gateway.choose),
        ]
    )
    return app


def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m gymexp.gateway.text_gateway", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--url", help="the endpoint's address, up to and with /v1")
    what.add_argument("--probe", action="store_true", help="canned replies instead of an endpoint")
    parser.add_argument("--model", help="the endpoint's name of the model")
    parser.add_argument("--key-env", help="the variable with the endpoint's key")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="for one reply, its retries included")
    parser.add_argument("--fd", type=int, required=True, help="an open listening socket of the parent's")
    args = parser.parse_args()
    log_to_stderr()
    guard = guard_of_environment()
    key = access_keys.required(args.key_env) if args.key_env else None
    policy = Probe() if args.probe else Endpoint(args.url, args.model, key, args.timeout_s)
    sock = adopt(args.fd)
    log.info(
        "gateway on %s, policy %s", url_of(sock), "probe" if args.probe else f"{args.model} at {args.url}"
    )
    serve(build_app(policy), sock, guard)


if __name__ == "__main__":
    main()
