"""One generation of an engine, and the JSON with which an engine answers it over HTTP.

The answer has the format of vLLM's `POST /inference/v1/generate`. The hf engine adds which weights sampled
how many tokens, from the first token to the last:

    {"choices": [{"token_ids", "logprobs": {"content": [{"logprob"}, ...]}, "finish_reason"}],
     "weights_versions": [[version, number of tokens], ...]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import orjson

from gymexp.rollout.outcome import Span

FinishReason = Literal["stop", "length", "abort"]


class EngineError(RuntimeError):
    """An engine is unreachable or closed, or it failed, or its answer breaks the protocol."""


@dataclass(frozen=True)
class Generation:
    """The tokens that an engine sampled for one request.

    token_ids: as sampled, including a sampled end token. logprobs: nats, as many as token_ids. finish_reason:
    "abort" if the engine was told to cut the generation, which then may have no token. versions: which
    weights sampled the tokens, as in `outcome.Turn`; None if the engine's answer does not have it.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    versions: list[Span] | None = None


def answer_of(generation: Generation) -> dict[str, Any]:
    """Returns the JSON object with which an engine answers."""
    choice = {
        "index": 0,
        "token_ids": generation.token_ids,
        "logprobs": {"content": [{"logprob": value} for value in generation.logprobs]},
        "finish_reason": generation.finish_reason,
    }
    if generation.versions is None:
        return {"choices": [choice]}
    return {"choices": [choice], "weights_versions": generation.versions}


def read_answer(body: bytes) -> Generation:
    """Returns the generation in an engine's answer. Raises EngineError if the answer breaks the protocol."""
    try:
        answer = orjson.loads(body)
        choice = answer["choices"][0]
        token_ids = choice["token_ids"]
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        finish_reason = choice["finish_reason"]
        spans = answer.get("weights_versions")
        versions = None if spans is None else [(version, count) for version, count in spans]
    except (orjson.JSONDecodeError, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise EngineError(f"gave no choice with token_ids and logprobs: {start_of(body)}") from error
    if not isinstance(token_ids, list) or not all(isinstance(value, float | int) for value in logprobs):
        raise EngineError(f"gave no choice with token_ids and logprobs: {start_of(body)}")
    if finish_reason not in get_args(FinishReason):
        raise EngineError(f"ended the generation with finish_reason {finish_reason!r}")
    if len(token_ids) != len(logprobs) or not (token_ids or finish_reason == "abort"):
        raise EngineError(f"gave {len(token_ids)} token_ids and {len(logprobs)} logprobs")
    if versions is not None and sum(count for _, count in versions) != len(token_ids):
        raise EngineError(f"gave {len(token_ids)} token_ids and weights_versions of {versions}")
    return Generation(token_ids, logprobs, finish_reason, versions)


def start_of(body: bytes) -> str:
    """Returns the first 500 bytes of an answer as text, for an error message."""
    return body[:500].decode(errors="replace")
