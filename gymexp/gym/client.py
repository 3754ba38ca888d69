"""Playing one task: POST /run to an agent, with a deadline, and what came back as a typed outcome.

NeMo Gym's `/run` does a whole episode. The reply's output items carry the token ids and log-probabilities of
every model turn (on the last item of the turn), as the gateway put them there.
"""

from __future__ import annotations

import asyncio
import copy
import json
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from gymexp.errors import TokenMismatch
from gymexp.policy.tokens import verify_turns
from gymexp.rollout.outcome import Cause, Completed, Played, Rollout, Task, Truncated, Turn


@dataclass(frozen=True)
class Sampling:
    """How the policy samples in a rollout. seed: of this rollout; the engine derives every token's draw from
    it. weights_version: optimizer steps behind the weights it samples with."""

    temperature: float
    top_p: float
    max_output_tokens: int
    seed: int
    weights_version: int = 0


class RolloutFailure(Exception):
    """One attempt at a rollout failed; `cause` as in `outcome.Failed`."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause: Cause = cause
        self.detail = detail


async def play(
    http: aiohttp.ClientSession, url: str, task: Task, sampling: Sampling, timeout_s: float, vocab_size: int
) -> Played:
    """One attempt at `task` with the agent at `url`. Raises RolloutFailure."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            async with http.post(
                f"{url}/run", data=request_body(task, sampling), headers={"Content-Type": "application/json"}
            ) as response:
                body = await response.read()
    except TimeoutError:
        raise RolloutFailure("timeout", f"no answer from {url}/run within {timeout_s:g} s") from None
    except aiohttp.ClientError as error:
        raise RolloutFailure("environment", f"{url}/run: {type(error).__name__}: {error}") from None
    if response.status != 200:
        text = body.decode(errors="replace")[:2000]
        raise RolloutFailure(_cause_in(body), f"{url}/run answered {response.status}: {text}")
    try:
        reply = _parse(body)
        return read_reply(task, reply, vocab_size, time.monotonic() - began, sampling.weights_version)
    except TokenMismatch as error:
        raise RolloutFailure("token_mismatch", str(error)) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RolloutFailure("environment", f"{url}/run answered what is not a rollout: {error!r}") from None


def _parse(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return json.loads(body)  # takes NaN and Infinity, as Python writes them: a reward is refused by name


def _cause_in(body: bytes) -> Cause:
    """The gateway's word for what failed, which agents pass on."""
    if b"token_mismatch" in body:
        return "token_mismatch"
    return "engine" if b"engine_error" in body else "environment"


def request_body(task: Task, sampling: Sampling) -> bytes:
    """The row as it is, with sampling parameters where NeMo Gym has them; the seed goes through its
    `extra_body`."""
    row = dict(task.row)
    params = copy.copy(row["responses_create_params"])
    params["temperature"] = sampling.temperature
    params["top_p"] = sampling.top_p
    params["max_output_tokens"] = sampling.max_output_tokens
    params["metadata"] = (params.get("metadata") or {}) | {"extra_body": f'{{"seed": {sampling.seed}}}'}
    row["responses_create_params"] = params
    return orjson.dumps(row)


def read_reply(
    task: Task, reply: dict[str, Any], vocab_size: int, seconds: float, weights_version: int = 0
) -> Played:
    """A verified outcome from `/run`'s reply. Raises TokenMismatch, RolloutFailure; on another shape
    ValueError, KeyError …"""
    response = reply["response"]
    items = response["output"]
    turns = []
    for item in items:
        if item.get("generation_token_ids"):
            ids = [int(i) for i in item["generation_token_ids"]]
            turns.append(Turn([int(i) for i in item["prompt_token_ids"]], ids, item["generation_log_probs"]))
    limit = "length" if (response.get("incomplete_details") or {}).get("reason") else None
    if not turns:
        raise RolloutFailure(
            "engine",
            "the policy's answer has no token ids: the prompt is longer than model.max_model_len"
            if limit
            else "the policy's answer has no token ids",
        )
    verify_turns(turns, vocab_size)
    if limit is None and items[-1].get("type") != "message":
        limit = "turns"
    reward = _read_reward(task, reply["reward"])
    kept = [{k: v for k, v in item.items() if k not in _TOKEN_FIELDS} for item in items]
    rollout = Rollout(task, turns, reward, kept, weights_version, {"total": round(seconds, 4)})
    return Truncated(rollout, limit) if limit else Completed(rollout)


# TRL computes a group's mean and deviation in float32: with rewards of 1e19 the deviation is infinite and
# each advantage 0. Squares of 1e16 can be added up over 1e6 rollouts.
MAX_REWARD = 1e16
_TOKEN_FIELDS = frozenset(("prompt_token_ids", "generation_token_ids", "generation_log_probs"))


def _read_reward(task: Task, value: Any) -> float:
    """A number, as NeMo Gym's `BaseVerifyResponse.reward` is. Raises RolloutFailure for anything else: to
    turn it into a number unasked would hide a mistake in the server."""
    said = f"the reward that {task.agent} (env.{task.env}) gave must be"
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = "null, as NeMo Gym writes NaN and infinities" if value is None else json.dumps(value)[:80]
        raise RolloutFailure("environment", f"{said} a number, got {shown}")
    if not abs(value) <= MAX_REWARD:
        raise RolloutFailure(
            "environment",
            f"{said} finite and within ±{MAX_REWARD:g}, as float32 does not hold the squares of larger ones, "
            f"which a group's deviation takes, got {str(value)[:40]}: scale it in the resources server",
        )
    return float(value)
