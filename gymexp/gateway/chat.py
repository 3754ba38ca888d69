"""OpenAI's chat completions as JSON objects: reads a request's fields, and builds the response."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson

from gymexp.rollout.generation import Generation

if TYPE_CHECKING:
    from gymexp.gateway.reply import Reply

# Fields of a chat request that would change the sampling, but that the gateway does not pass to an engine. A
# value other than a neutral one is refused: an error is better than sampling silently from another
# distribution than the request wants.
NEUTRAL_FIELDS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "moderation": (),
    "stream_options": (),
}


class BadRequest(ValueError):
    """The request breaks a rule of this endpoint. The gateway answers 400 with this message."""


def read_object(data: bytes) -> dict[str, Any]:
    """Returns the JSON object in a request's body. Raises BadRequest if the body is anything else."""
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body must be JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def read_stop(body: dict[str, Any]) -> list[str]:
    """Returns the stop strings, each of which ends the generation. Raises BadRequest if `stop` has another
    type.
    """
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise BadRequest(f"stop must be a text or a list of texts, got {body['stop']!r}")
    return stop


def read_play(body: dict[str, Any]) -> str | None:
    """Returns the name of the attempt at a rollout that the request belongs to; None if the client is not
    gymexp, which alone sends `play`. Raises BadRequest if `play` is not a string.
    """
    play = body.get("play")
    if play is not None and not isinstance(play, str):
        raise BadRequest(f"play must be a text, got {play!r}")
    return play


def read_number(body: dict[str, Any], name: str, default: float) -> float:
    """Returns the number in field `name`; `default` if it is absent. Raises BadRequest if it is < 0."""
    value = default if body.get(name) is None else body[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise BadRequest(f"{name} must be a number >= 0, got {value!r}")
    return value


def read_top_k(body: dict[str, Any]) -> int:
    """Returns `top_k`, where 0 and -1 stand for all tokens. Raises BadRequest unless it is an integer
    >= -1.
    """
    value = body["top_k"]
    if type(value) is not int or value < -1:
        raise BadRequest(f"top_k must be an integer >= 1, or 0 or -1 for all tokens, got {value!r}")
    return value


def check_neutral(body: dict[str, Any]) -> None:
    """Raises BadRequest if a field of NEUTRAL_FIELDS has a value that would change the sampling."""
    for name, allowed in NEUTRAL_FIELDS.items():
        if (value := body.get(name)) is not None and value not in allowed:
            rule = " or ".join(map(repr, allowed)) or "left out"
            raise BadRequest(f"{name} must be {rule} for this gateway, got {value!r}")


def sampling_params(body: dict[str, Any], prompt_length: int, max_model_len: int | None) -> dict[str, Any]:
    """Returns the engine's sampling parameters. A field that the request leaves out gets OpenAI's default,
    and max_tokens is clipped to the room behind the prompt. Raises BadRequest if a field breaks a rule.
    """
    params = {
        "temperature": read_number(body, "temperature", 1.0),
        "top_p": read_number(body, "top_p", 1.0),
        "max_tokens": room(body, prompt_length, max_model_len),
        "logprobs": 0,  # only the sampled token's
    }
    # Parameters of vLLM's that OpenAI's API does not have; an evaluation may set them.
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
    """Returns how many tokens may be generated: the requested number, or as many as fit behind the prompt.

    Raises BadRequest if the request sets no valid number, or if the prompt leaves no room for a token.
    """
    requested = body.get("max_completion_tokens")
    requested = body.get("max_tokens") if requested is None else requested
    # The first two messages must not contain "max_tokens" or "context length". NeMo Gym reads a 400 with one
    # of these as a prompt that is too long, and ends the rollout with an empty message without token ids.
    if requested is not None and (type(requested) is not int or requested < 1):
        raise BadRequest(f"max_completion_tokens must be an integer >= 1, got {requested!r}")
    if max_model_len is None:
        if requested is None:
            raise BadRequest(
                "max_completion_tokens must be given, as the gateway was started without --max-model-len"
            )
        return requested
    if prompt_length >= max_model_len:
        raise BadRequest(
            f"the prompt must leave room for a reply: it has {prompt_length} tokens, "
            f"and the maximum context length is {max_model_len} tokens"
        )
    return min(requested or max_model_len, max_model_len - prompt_length)


def completion(
    model: str, prompt_ids: list[int], generation: Generation, reply: Reply, token_texts: list[str] | None
) -> dict[str, Any]:
    """Returns the response to a chat request. Its message carries the ids and log-probabilities, which NeMo
    Gym sends back on the next turn.

    token_texts: the text of each generated token if the request wants OpenAI's own `logprobs` too, else None.
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
