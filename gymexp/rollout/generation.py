"""One generation of an engine, and the JSON with which an engine answers it over HTTP.

The answer has the format of vLLM's `POST /inference/v1/generate`. The hf engine adds the version of its
weights:

    {"choices": [{"token_ids", "logprobs": {"content": [{"logprob"}, ...]}, "finish_reason"}],
     "weights_version", "first_weights_version"}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import orjson

FinishReason = Literal["stop", "length"]


class EngineError(RuntimeError):
    """An engine is unreachable or closed, or it failed, or its answer breaks the protocol."""


@dataclass(frozen=True)
class Generation:
    """The tokens that an engine sampled for one request.

    token_ids: as sampled, including a sampled end token. logprobs: nats, as many as token_ids.
    weights_versions: the versions of the weights that sampled the first and the last token, in optimizer
    steps done; they differ if the weights were updated between the two tokens. None if the engine's answer
    does not have them.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    weights_versions: tuple[int, int] | None = None


def answer_of(generation: Generation) -> dict[str, Any]:
    """Returns the JSON object with which an engine answers."""
    choice = {
        "index": 0,
        "token_ids": generation.token_ids,
        "logprobs": {"content": [{"logprob": value} for value in generation.logprobs]},
        "finish_reason": generation.finish_reason,
    }
    if generation.weights_versions is None:
        return {"choices": [choice]}
    first, last = generation.weights_versions
    return {"choices": [choice], "weights_version": last, "first_weights_version": first}


def read_answer(body: bytes) -> Generation:
    """Returns the generation in an engine's answer. Raises EngineError if the answer breaks the protocol.

    A generation that the engine itself cut off breaks the protocol too: vLLM answers with finish_reason
    "abort" when it is paused or its weights are replaced.
    """
    try:
        answer = orjson.loads(body)
        choice = answer["choices"][0]
        last_version = answer.get("weights_version")
        first_version = answer.get("first_weights_version", last_version)
        token_ids = choice["token_ids"]
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        finish_reason = choice["finish_reason"]
    except (orjson.JSONDecodeError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise EngineError(f"gave no choice with token_ids and logprobs: {start_of(body)}") from error
    if not isinstance(token_ids, list) or not all(isinstance(value, float | int) for value in logprobs):
        raise EngineError(f"gave no choice with token_ids and logprobs: {start_of(body)}")
    if not token_ids or len(token_ids) != len(logprobs):
        raise EngineError(f"gave {len(token_ids)} token_ids and {len(logprobs)} logprobs")
    if finish_reason not in get_args(FinishReason):
        raise EngineError(f"ended the generation with finish_reason {finish_reason!r}")
    versions = None if last_version is None else (first_version, last_version)
    return Generation(token_ids, logprobs, finish_reason, versions)


def start_of(body: bytes) -> str:
    """Returns the first 500 bytes of an answer as text, for an error message."""
    return body[:500].decode(errors="replace")
