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
from gymexp.processes.keys import POLICY, header_of
from gymexp.rollout.outcome import Cause, Completed, Played, Rollout, Task, Truncated, Turn
from gymexp.rollout.tokens import verify_turns


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """What tokens are drawn from: the policy's softmax at a temperature (0: the likeliest token), and what
    vLLM's sampling parameters of these names make of it. Training is at their defaults, as the trainer
    computes log-probabilities of nothing else."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sampling(Distribution):
    """How the policy samples in a rollout. seed: of this rollout; the gateway derives the seed of each of its
    sampling calls from it. play: names one playing of the rollout; the gateway knows its calls by that."""

    max_output_tokens: int
    seed: int
    play: str = ""


class RolloutFailure(Exception):
    """One attempt at a rollout failed; `cause` as in `outcome.Failed`. server: the one that failed, where
    that is known."""

    def __init__(self, cause: Cause, detail: str, server: str = "") -> None:
        super().__init__(detail)
        self.cause: Cause = cause
        self.detail = detail
        self.server = server


async def play(
    http: aiohttp.ClientSession,
    url: str,
    task: Task,
    sampling: Sampling,
    timeout_s: float,
    vocab_size: int,
    max_steps: int | None,
    refused_reward: float,
) -> Played:
    """One attempt at `task` with the agent at `url`, whose limit of turns is max_steps. refused_reward: where
    the environment refuses what the policy said. Raises RolloutFailure."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            headers = {"Content-Type": "application/json"} | header_of(POLICY)
            async with http.post(
                f"{url}/run", data=request_body(task, sampling), headers=headers
            ) as response:
                body = await response.read()
    except TimeoutError:
        raise RolloutFailure("timeout", f"no answer from {url}/run within {timeout_s:g} s") from None
    except aiohttp.ClientError as error:
        raise RolloutFailure("environment", f"{url}/run: {type(error).__name__}: {error}") from None
    refused = _refusal(body, refused_reward) if response.status == 400 else None
    if response.status != 200 and refused is None:
        cause, text = _cause_in(body), body.decode(errors="replace")[:2000]
        server, said = _origin(response.headers.get("x-gymexp-failed", ""))
        if cause == "environment" and server:
            raise RolloutFailure(cause, f"{server}: {said}", server)
        who = f"agent {task.agent}: " if cause == "token_mismatch" else ""
        raise RolloutFailure(cause, f"{who}{url}/run answered {response.status}: {text}")
    try:
        reply = refused or _parse(body)
        return read_reply(task, reply, vocab_size, time.monotonic() - began, max_steps)
    except TokenMismatch as error:
        raise RolloutFailure("token_mismatch", f"agent {task.agent}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RolloutFailure("environment", f"{url}/run answered what is not a rollout: {error!r}") from None


def _origin(told: str) -> tuple[str, str]:
    """The server that failed first and why, as `gym/host.py` lets an agent tell it; empty where it did
    not."""
    try:
        said = orjson.loads(told)
        return str(said["server"]), str(said["said"])
    except (ValueError, KeyError, TypeError):
        return "", ""


def _refusal(body: bytes, reward: float) -> dict[str, Any] | None:
    """The reply that `gym/host.py` lets an agent give where a server refused the policy's words, as one with
    a reward; None if it is another."""
    try:
        said = orjson.loads(body)
        responses = said["responses"]
        output = [item for response in responses for item in response["output"]]
        return {"reward": reward, "response": responses[-1] | {"output": output}, "refused": said["refused"]}
    except (ValueError, KeyError, TypeError, IndexError):
        return None


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
    """The row as it is, with sampling parameters where NeMo Gym has them. `extra_body` goes to the policy
    with every turn: through it the gateway gets what OpenAI's responses have no field for, the rollout's seed
    and the name of this playing."""
    row = dict(task.row)
    params = copy.copy(row["responses_create_params"])
    params["temperature"] = sampling.temperature
    params["top_p"] = sampling.top_p
    params["max_output_tokens"] = sampling.max_output_tokens
    extra: dict[str, Any] = {"seed": sampling.seed, "play": sampling.play}
    for name in ("top_k", "min_p", "repetition_penalty"):
        if (value := getattr(sampling, name)) != getattr(Distribution, name):
            extra[name] = value
    params["metadata"] = (params.get("metadata") or {}) | {"extra_body": orjson.dumps(extra).decode()}
    row["responses_create_params"] = params
    return orjson.dumps(row)


def read_reply(
    task: Task, reply: dict[str, Any], vocab_size: int, seconds: float, max_steps: int | None = None
) -> Played:
    """A verified outcome from `/run`'s reply. Raises TokenMismatch, RolloutFailure; on another shape
    ValueError, KeyError …

    max_steps: the agent's limit of model turns, None where it has none.
    """
    response = reply["response"]
    items = response["output"]
    turns = []
    for item in items:
        if item.get("generation_token_ids"):
            ids = [int(i) for i in item["generation_token_ids"]]
            turns.append(Turn([int(i) for i in item["prompt_token_ids"]], ids, item["generation_log_probs"]))
    limit = "length" if (response.get("incomplete_details") or {}).get("reason") else None
    if not turns:
        if limit:
            raise RolloutFailure(
                "prompt_too_long",
                "with what the environment adds to it, the first prompt is longer than model.max_model_len: "
                "raise that, or leave the row out",
            )
        raise RolloutFailure("engine", "the policy's answer has no token ids")
    verify_turns(turns, vocab_size)
    if limit is None and _ran_out_of_turns(reply, items, len(turns), max_steps):
        limit = "turns"
    reward = _read_reward(task, reply["reward"])
    kept = [{k: v for k, v in item.items() if k not in _TOKEN_FIELDS} for item in items]
    refused = reply.get("refused") if isinstance(reply.get("refused"), str) else ""
    rollout = Rollout(task, turns, reward, kept, seconds={"total": round(seconds, 4)}, refused=refused or "")
    return Truncated(rollout, limit) if limit else Completed(rollout)


def _ran_out_of_turns(
    reply: dict[str, Any], items: list[dict[str, Any]], num_turns: int, max_steps: int | None
) -> bool:
    """Whether a limit ended the episode, not policy or environment.

    An agent may say it (`truncated`, `terminated`: NeMo Gym's gymnasium_agent). Otherwise one that has
    reached its limit was ended by it, unless the policy's last act was to say something, or to call a tool
    that its agent does not run.
    """
    if reply.get("truncated") or reply.get("terminated"):
        return bool(reply.get("truncated"))
    if max_steps is None or num_turns < max_steps:
        return False
    return items[-1].get("type") not in ("message", "function_call")


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
