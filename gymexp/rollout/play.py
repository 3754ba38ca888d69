"""Plays one task: sends POST /run to an agent, with a deadline, and reads the answer as a typed outcome.

NeMo Gym's `/run` plays a whole episode. The last output item of each model turn carries the turn's token ids
and log-probabilities, which the gateway had added to its reply.
"""

from __future__ import annotations

import asyncio
import copy
import json
import struct
import time
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import orjson

from gymexp.errors import TokenMismatch
from gymexp.printable import printable
from gymexp.processes.access_keys import POLICY, header_of
from gymexp.rollout.episode import failure_in, result_of, typed_request
from gymexp.rollout.outcome import Cause, Completed, Played, Rollout, Task, Truncated, Turn
from gymexp.rollout.tokens import verify_turns


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """The distribution of the sampled tokens: the policy's softmax at a temperature (0: the likeliest token),
    changed by vLLM's sampling parameters of the same names. Training uses the defaults of these parameters,
    as the trainer computes log-probabilities of no other distribution.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sampling(Distribution):
    """How the policy samples in a rollout.

    seed: of this rollout; the gateway derives the seed of each sampling call from it. play: the name of one
    attempt at the rollout, by which the gateway recognizes the attempt's calls.
    """

    max_output_tokens: int
    seed: int
    play: str = ""


class RolloutFailure(Exception):
    """One attempt at a rollout failed. cause: as in `outcome.Failed`. server: the name of the server that
    failed; "" if it is unknown. is_final: another attempt would fail too.
    """

    def __init__(self, cause: Cause, detail: str, server: str = "", is_final: bool = False) -> None:
        super().__init__(detail)
        self.cause: Cause = cause
        self.detail = detail
        self.server = server
        self.is_final = is_final or cause == "prompt_too_long"


async def play(
    http: aiohttp.ClientSession,
    url: str,
    task: Task,
    sampling: Sampling,
    timeout_s: float,
    vocab_size: int | None,
    max_steps: int | None,
    refused_reward: float,
    takes_episodes: bool = False,
) -> Played:
    """Plays one attempt at `task` with the agent at `url`, and returns its outcome. Raises RolloutFailure.

    vocab_size: of the policy, whose answers must have token ids below it; None for a policy whose answers are
    text alone, which training never plays with. max_steps: the agent's limit of turns; None if it has none.
    refused_reward: the reward if the environment refuses the policy's reply. takes_episodes: `url` is that of
    an environment server.
    """
    began, began_at = time.monotonic(), time.time()
    try:
        async with asyncio.timeout(timeout_s):
            headers = {"Content-Type": "application/json", "x-gymexp-seconds-left": f"{timeout_s:g}"}
            headers |= header_of(POLICY)
            async with http.post(
                f"{url}/run", data=request_body(task, sampling, takes_episodes), headers=headers
            ) as response:
                body = await response.read()
    except TimeoutError:
        raise RolloutFailure("timeout", f"no answer from {url}/run within {timeout_s:g} s") from None
    except aiohttp.ClientError as error:
        raise RolloutFailure("environment", f"{url}/run: {type(error).__name__}: {error}") from None
    refused = _refusal(body, refused_reward) if response.status == 400 else None
    server, reason, is_engine = _read_failed_header(response.headers.get("x-gymexp-failed", ""))
    if response.status != 200 and refused is None:
        if is_engine:
            raise RolloutFailure("engine", reason)
        cause, text = _cause_in(body), body.decode(errors="replace")[:2000]
        if cause == "environment" and server:
            raise RolloutFailure(cause, f"{server}: {reason}", server)
        prefix = f"agent {task.agent}: " if cause == "token_mismatch" else ""
        raise RolloutFailure(cause, f"{prefix}{url}/run answered {response.status}: {text}")
    try:
        reply = refused or _parse(body)
        if failure := failure_in(reply):
            if is_engine:
                raise RolloutFailure("engine", reason, is_final=failure.terminal)
            cause = _cause_in(failure.detail.encode())
            cause = failure.cause if cause == "environment" else cause
            detail = f"{server}: {reason}" if server else f"agent {task.agent}: {failure.detail}"
            raise RolloutFailure(cause, detail, server, failure.terminal)
        reply = result_of(reply)
        played = read_reply(task, reply, vocab_size, time.monotonic() - began, max_steps)
        rollout = replace(played.rollout, began=round(began_at, 3), seed=sampling.seed)
        return replace(played, rollout=rollout)
    except TokenMismatch as error:
        raise RolloutFailure("token_mismatch", f"agent {task.agent}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RolloutFailure("environment", f"{url}/run answered what is not a rollout: {error!r}") from None


def _read_failed_header(header: str) -> tuple[str, str, bool]:
    """Returns the server that failed first, its error, and whether the gateway says that it is the engine's,
    from the header that `gym/host.py` adds to an agent's answer. Returns ("", "", False) if the header is
    absent or is not of this form.
    """
    try:
        failure = orjson.loads(header)
        return str(failure["server"]), str(failure["said"]), failure.get("cause") == "engine"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", "", False


def _refusal(body: bytes, reward: float) -> dict[str, Any] | None:
    """Returns a reply with `reward` if the body is the answer that `gym/host.py` lets an agent give when a
    server refused the policy's reply; None if it is any other.
    """
    try:
        refusal = orjson.loads(body)
        responses = refusal["responses"]
        output = [item for response in responses for item in response["output"]]
        return {
            "reward": reward,
            "response": responses[-1] | {"output": output},
            "refused": refusal["refused"],
        }
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def _parse(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        # It takes NaN and Infinity, as Python writes them: `_read_reward` refuses them with a clear message.
        return json.loads(body)


def _cause_in(body: bytes) -> Cause:
    """Returns the cause of a failure from the gateway's error type, which agents pass on in their answers."""
    if b"token_mismatch" in body:
        return "token_mismatch"
    return "engine" if b"engine_error" in body else "environment"


def request_body(task: Task, sampling: Sampling, takes_episodes: bool = False) -> bytes:
    """Returns the body of `/run`: the task's row with sampling parameters in NeMo Gym's fields for them; in a
    typed episode if an environment server takes one.

    NeMo Gym sends `extra_body` to the policy with every turn. It gives the gateway the values for which
    OpenAI's responses have no field, such as the rollout's seed and the name of this attempt.
    """
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
    return orjson.dumps(typed_request(task, row, sampling.play) if takes_episodes else row)


def read_reply(
    task: Task, reply: dict[str, Any], vocab_size: int | None, seconds: float, max_steps: int | None = None
) -> Played:
    """Returns the verified outcome in `/run`'s reply.

    vocab_size: None if the policy's answers are text alone; the rollout then has no turns but a usage.
    seconds: how long the attempt took. max_steps: the agent's limit of model turns; None if it has none.
    Raises TokenMismatch, RolloutFailure; if the reply has another form, ValueError, KeyError, TypeError or
    AttributeError.
    """
    response = reply["response"]
    items = response["output"]
    turns = []
    for item in items:
        if item.get("generation_token_ids"):
            ids = _as_ids(item["generation_token_ids"])
            turns.append(Turn(_as_ids(item["prompt_token_ids"]), ids, item["generation_log_probs"]))
    limit = "length" if (response.get("incomplete_details") or {}).get("reason") else None
    num_turns = len(turns) if vocab_size is not None else _count_turns(items)
    if not num_turns:
        if limit:
            raise RolloutFailure(
                "prompt_too_long",
                "with what the environment adds to it, the first prompt is longer than model.max_model_len: "
                "raise that, or leave the row out",
            )
        lacks = "no token ids" if vocab_size is not None else "no message"
        raise RolloutFailure("engine", f"the policy's answer has {lacks}")
    if vocab_size is not None:
        verify_turns(turns, vocab_size)
    if limit is None and _ran_out_of_turns(reply, items, num_turns, max_steps):
        limit = "turns"
    reward = _read_reward(task, reply["reward"])
    items_without_tokens = [{k: v for k, v in item.items() if k not in _TOKEN_FIELDS} for item in items]
    if _size(items_without_tokens) is None:
        raise RolloutFailure("environment", "the episode's items cannot be written as JSON")
    refused = reply.get("refused") if isinstance(reply.get("refused"), str) else ""
    rollout = Rollout(
        task,
        turns if vocab_size is not None else [],
        reward,
        items_without_tokens,
        seconds={"total": round(seconds, 4)},
        refused=refused or "",
        verdict=_read_verdict(task, reply),
        usage={"turns": num_turns} if vocab_size is None else None,
    )
    return Truncated(rollout, limit) if limit else Completed(rollout)


def _as_ids(values: list[Any]) -> list[int]:
    """Returns token ids as numbers. NeMo Gym's models allow texts. Raises ValueError, TypeError."""
    try:
        struct.pack(f"{len(values)}q", *values)  # the fastest way to see that all are integers
        return values
    except struct.error:
        return [int(value) for value in values]


def _count_turns(items: list[dict[str, Any]]) -> int:
    """Returns the number of the policy's turns in an episode without token ids: its items in a row count as
    one turn.
    """
    by_policy = [
        item.get("type") in ("reasoning", "function_call")
        or (item.get("type") == "message" and item.get("role") == "assistant")
        for item in items
    ]
    return sum(own and not before for before, own in zip([False, *by_policy], by_policy, strict=False))


def _read_verdict(task: Task, reply: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of the environment's answer that are neither the episode, nor the reward, nor the
    task's own, which many servers send back. A note of its size replaces a field that would make them longer
    than MAX_VERDICT_BYTES.
    """
    verdict: dict[str, Any] = {}
    room = MAX_VERDICT_BYTES
    for name, value in reply.items():
        if name in _EPISODE_FIELDS or value is None or task.row.get(name) == value:
            continue
        if (size := _size({name: value})) is None:
            verdict[printable(name)] = "(cannot be written as JSON)"
        elif size > room:
            verdict[name] = f"({size} bytes, left out)"
        else:
            verdict[name] = value
            room -= size
    return verdict


def _size(value: Any) -> int | None:
    """Returns the bytes of a value as JSON; None if a rollout file cannot have it. orjson reads values that
    it does not write, nested deeper than 254, and `json.loads` reads what is no JSON (lone surrogates).
    """
    try:
        return len(orjson.dumps([[[[value]]]]))  # as deep as in a rollout file
    except (TypeError, RecursionError):
        return None


def _ran_out_of_turns(
    reply: dict[str, Any], items: list[dict[str, Any]], num_turns: int, max_steps: int | None
) -> bool:
    """Returns whether a limit of turns ended the episode, and not the policy or the environment.

    The agent's reply may have `truncated` and `terminated` (NeMo Gym's gymnasium_agent), which then decide.
    Otherwise an episode of max_steps turns was ended by the limit, unless its last item is a message of the
    policy, or a call of a tool that the agent does not run.
    """
    if reply.get("truncated") or reply.get("terminated"):
        return bool(reply.get("truncated"))
    if max_steps is None or num_turns < max_steps:
        return False
    return items[-1].get("type") not in ("message", "function_call")


# TRL computes a group's mean and deviation in float32. With rewards of 1e19 the deviation would be infinite
# and each advantage 0. The squares of 1e16 can be added up over 1e6 rollouts.
MAX_REWARD = 1e16
MAX_VERDICT_BYTES = 1 << 16
_EPISODE_FIELDS = frozenset(("response", "responses_create_params", "reward", "refused", "mask_sample"))
_TOKEN_FIELDS = frozenset(("prompt_token_ids", "generation_token_ids", "generation_log_probs"))


def _read_reward(task: Task, value: Any) -> float:
    """Returns the reward as a float. Raises RolloutFailure unless it is a number, as in NeMo Gym's
    `BaseVerifyResponse`, and within MAX_REWARD: a silent conversion would hide a mistake in the server.
    """
    rule = f"the reward that {task.agent} (env.{task.env}) gave must be"
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = "null, as NeMo Gym writes NaN and infinities" if value is None else json.dumps(value)[:80]
        raise RolloutFailure("environment", f"{rule} a number, got {shown}")
    if not abs(value) <= MAX_REWARD:
        raise RolloutFailure(
            "environment",
            f"{rule} finite and within ±{MAX_REWARD:g}, as TRL adds up the squares of a group's rewards in "
            f"float32, got {str(value)[:40]}: scale it in the resources server",
        )
    return float(value)
