"""OpenAI's chat completions as JSON objects: what a request asks for, and what an answer looks like."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson

from gymexp.rollout.generation import Generation

if TYPE_CHECKING:
    from gymexp.gateway.reply import Reply

# Fields of a chat request that change what is sampled and that no engine is given. Other than neutral, they
# are refused: a sampling distribution that silently differs from the asked one is worse than an error.
NEUTRAL_FIELDS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}


class BadRequest(ValueError):
    """The request breaks a rule of this endpoint; answered with 400 and this text."""


def read_object(data: bytes) -> dict[str, Any]:
    """A request's body. Raises BadRequest unless it is a JSON object."""
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body must be JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def read_stop(body: dict[str, Any]) -> list[str]:
    """The texts that end a generation. Raises BadRequest."""
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise BadRequest(f"stop must be a text or a list of texts, got {body['stop']!r}")
    return stop


def read_play(body: dict[str, Any]) -> str | None:
    """Which playing of which rollout asks, as gymexp's client says it; None from any other client."""
    play = body.get("play")
    if play is not None and not isinstance(play, str):
        raise BadRequest(f"play must be a text, got {play!r}")
    return play


def read_number(body: dict[str, Any], name: str, default: float) -> float:
    """A number >= 0. Raises BadRequest."""
    value = default if body.get(name) is None else body[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise BadRequest(f"{name} must be a number >= 0, got {value!r}")
    return value


def read_top_k(body: dict[str, Any]) -> int:
    """An integer; 0 and -1 stand for all tokens. Raises BadRequest."""
    value = body["top_k"]
    if type(value) is not int or value < -1:
        raise BadRequest(f"top_k must be an integer >= 1, or 0 or -1 for all tokens, got {value!r}")
    return value


def check_neutral(body: dict[str, Any]) -> None:
    """Raises BadRequest for a field that no engine is given and that asks for something."""
    for name, allowed in NEUTRAL_FIELDS.items():
        if (value := body.get(name)) is not None and value not in allowed:
            raise BadRequest(f"{name} must be {' or '.join(map(repr, allowed))} here, got {value!r}")


def sampling_params(body: dict[str, Any], prompt_length: int, max_model_len: int | None) -> dict[str, Any]:
    """What the engine is told: OpenAI's defaults where the request says nothing, max_tokens clipped to what
    fits.
    """
    params = {
        "temperature": read_number(body, "temperature", 1.0),
        "top_p": read_number(body, "top_p", 1.0),
        "max_tokens": room(body, prompt_length, max_model_len),
        "logprobs": 0,  # of the sampled token alone
    }
    # What vLLM has beyond OpenAI's parameters; an evaluation may ask for it.
    if body.get("top_k") is not None:
        params["top_k"] = read_top_k(body)
    for name in ("min_p", "repetition_penalty"):
        if body.get(name) is not None:
            params[name] = read_number(body, name, 0.0)
    if stop := read_stop(body):
        params["stop"] = stop
    if (seed := body.get("seed")) is not None:
        if type(seed) is not int:
            raise BadRequest(f"seed must be an integer, got {seed!r}")
        params["seed"] = seed
    return params


def room(body: dict[str, Any], prompt_length: int, max_model_len: int | None) -> int:
    """How many tokens may be generated: what was asked for, or as much of it as fits behind the prompt."""
    asked = body.get("max_completion_tokens")
    asked = body.get("max_tokens") if asked is None else asked
    # These texts must not say "max_tokens": NeMo Gym takes a 400 with that word, or with "context length",
    # for a prompt that is too long, and ends the rollout with an empty message that has no token ids.
    if asked is not None and (type(asked) is not int or asked < 1):
        raise BadRequest(f"max_completion_tokens must be an integer >= 1, got {asked!r}")
    if max_model_len is None:
        if asked is None:
            raise BadRequest(
                "max_completion_tokens must be given, as the gateway was started without --max-model-len"
            )
        return asked
    if prompt_length >= max_model_len:
        raise BadRequest(
            f"the prompt must leave room for a reply: it has {prompt_length} tokens, "
            f"and the maximum context length is {max_model_len} tokens"
        )
    return min(asked or max_model_len, max_model_len - prompt_length)


def completion(
    model: str, prompt_ids: list[int], generation: Generation, reply: Reply, token_texts: list[str] | None
) -> dict[str, Any]:
    """The answer. Its message carries the ids and log-probabilities, which NeMo Gym sends back on the next
    turn.

    token_texts: given if the request wants OpenAI's own `logprobs` as well.
    """
    message: dict[str, Any] = {
        "role": "assistant",
        "content": reply.content or (None if reply.tool_calls else ""),
        "prompt_token_ids": prompt_ids,
        "generation_token_ids": generation.token_ids,
        "generation_log_probs": generation.logprobs,
    }
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = reply.tool_calls
    is_call = bool(reply.tool_calls) and generation.finish_reason == "stop"
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": "tool_calls" if is_call else generation.finish_reason,
        "logprobs": None,
    }
    if token_texts is not None:
        choice["logprobs"] = {
            "content": [
                {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, logprob in zip(token_texts, generation.logprobs, strict=True)
            ]
        }
    num_prompt, num_completion = len(prompt_ids), len(generation.token_ids)
    return {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
        },
    }
