"""Token ids of a rollout: builds the next turn's prompt, and verifies that training sees the sampled tokens.

Pure: no I/O and no torch. A tokenizer is anything with transformers' `apply_chat_template`,
`get_chat_template`, `encode` and `decode`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import struct
from array import array
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from gymexp.errors import TokenMismatch
from gymexp.rollout.outcome import Turn

Message = dict[str, Any]

# Stands for the sampled text while the template renders the messages after it. It is random, so that no
# conversation contains it.
SENTINEL = f"sampled{uuid4().hex}"

# A 32-bit log-softmax of logits near 100 rounds by up to 1e-5, so the log-probability of a certain token may
# come out above 0 by that much. A larger number is no log-probability (a probability, a logit, another sign).
LOGPROB_ROUNDING = 1e-5


def is_sampled(message: Message) -> bool:
    """Returns whether the message is an assistant's and carries the ids that the policy sampled."""
    return message.get("role") == "assistant" and bool(message.get("generation_token_ids"))


def last_sampled(messages: Sequence[Message]) -> int | None:
    """Returns the index of the last assistant message that carries its token ids, or None."""
    return next((i for i in reversed(range(len(messages))) if is_sampled(messages[i])), None)


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Returns the conversation's text as the chat template writes it.

    Before that, text parts of a content list are joined with newlines (as vLLM does), and null content
    becomes "". Arguments in JSON text become objects, which templates want; text that is no JSON object stays
    text. The role "developer" becomes "system" if the template does not know it, because templates drop
    unknown roles. Raises ValueError if a message has a part that is not text, or if the template refuses the
    conversation.
    """
    knows_developer = "developer" in tokenizer.get_chat_template(tools=tools or None)
    plain = [_plain(message, knows_developer) for message in messages]
    try:
        return tokenizer.apply_chat_template(
            plain,
            tools=tools or None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **(template_kwargs or {}),
        )
    except Exception as error:  # a template is a program: it raises TypeError, KeyError, … as well
        raise ValueError(
            f"the chat template refuses this conversation: {type(error).__name__}: {error}"
        ) from error


def encode(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of rendered text. Adds no special tokens, as the template has written them already."""
    return tokenizer.encode(text, add_special_tokens=False)


def splice(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Returns the prompt ids of the next turn: the previous turn's ids exactly as sampled, then the ids of
    the messages after it.

    messages: the last assistant message that carries `prompt_token_ids` and `generation_token_ids` is the
    previous turn; the messages after it (tool results, a user message, assistant messages without ids) are
    the environment's. tools and template_kwargs: those of the first turn. The result starts with the previous
    turn's prompt + generation.

    The template renders the conversation with a sentinel in place of the sampled message. The text after the
    sentinel gives the new ids. It starts with the template's end of turn, which is left out if the policy
    sampled it, and is kept if a length limit or a stop string cut the generation. So separators behind the
    end of turn are kept, and the template's changes to earlier turns (dropped reasoning, trimmed text,
    reordered arguments) do not matter. Templates that show a tool's result only behind its call (gpt-oss) get
    the sentinel inside the call's arguments.

    Raises ValueError if no message carries ids or the template refuses the conversation. Raises TokenMismatch
    if the template leaves out the sampled message or one after it, as the prompt would silently lack it.
    """
    index = last_sampled(messages)
    if index is None:
        raise ValueError("splice needs an assistant message with prompt_token_ids and generation_token_ids")
    sampled = messages[index]
    generation_ids: list[int] = sampled["generation_token_ids"]
    prompt_ids = sampled.get("prompt_token_ids")
    if not prompt_ids:
        raise ValueError(f"messages[{index}] has generation_token_ids but no prompt_token_ids")

    def tail_ids(stand_in: Message) -> list[int]:
        """Returns the ids of the text after the sentinel. stand_in: a message that contains the sentinel."""
        conversation = [*messages[:index], stand_in, *messages[index + 1 :]]
        text = render(tokenizer, conversation, tools, template_kwargs)
        return encode(tokenizer, _text_after_sentinel(text, conversation, index))

    last_id = generation_ids[-1]
    try:
        ids = tail_ids({"role": "assistant", "content": SENTINEL})
        ids = _without_sampled_end(tokenizer, ids, last_id)
    except (ValueError, TokenMismatch) as error:
        calls = sampled.get("tool_calls")
        if not calls or last_id not in tokenizer.added_tokens_decoder:
            raise
        function = {**calls[-1]["function"], "arguments": {"sampled": SENTINEL}}
        call = {**calls[-1], "function": function}
        try:
            ids = tail_ids({"role": "assistant", "content": "", "tool_calls": [*calls[:-1], call]})
        except (ValueError, TokenMismatch):
            raise error from None
        if last_id not in ids:
            raise
        ids = ids[ids.index(last_id) + 1 :]
    return [*prompt_ids, *generation_ids, *ids]


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """Returns the ids at which sampling stops: the tokenizer's EOS, and the special token that ends a turn of
    the chat template. If the tokenizer has another template for tools, its end of turn is included.

    EOS and end of turn differ for base models with a chat template, and for Gemma.
    """
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    conversation = [{"role": "user", "content": "x"}, {"role": "assistant", "content": SENTINEL}]
    for template in {tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[])}:
        with contextlib.suppress(ValueError):
            named = {"chat_template": template}
            text = render(tokenizer, conversation, template_kwargs=named, add_generation_prompt=False)
            closing = encode(tokenizer, text.partition(SENTINEL)[2].lstrip())[:1]
            ids |= set(closing) & set(tokenizer.added_tokens_decoder)
    return sorted(ids)


def verify_turns(turns: Sequence[Turn], vocab_size: int) -> None:
    """Raises TokenMismatch unless the turns of one rollout are fit for training.

    The rules: each prompt starts with the previous turn's prompt + completion; completion_ids and logprobs
    have equal, non-zero length; log-probabilities are finite and at most 0 (LOGPROB_ROUNDING is tolerated);
    ids are ints in [0, vocab_size).
    """
    if not turns:
        raise TokenMismatch("a rollout must have at least one turn, got none")
    previous: list[int] = []
    for number, turn in enumerate(turns):
        where = f"turn {number}"
        continues = turn.prompt_ids[: len(previous)] == previous
        # Ids that equal verified ones need no second look, and most ids of a later turn do.
        _verify_ids(turn.prompt_ids, vocab_size, f"{where}: prompt_ids", len(previous) if continues else 0)
        _verify_ids(turn.completion_ids, vocab_size, f"{where}: completion_ids")
        if len(turn.logprobs) != len(turn.completion_ids):
            raise TokenMismatch(
                f"{where}: logprobs must be as many as completion_ids ({len(turn.completion_ids)}), "
                f"got {len(turn.logprobs)}"
            )
        _verify_logprobs(turn.logprobs, where)
        if not continues:
            position = _first_difference(previous, turn.prompt_ids)
            got = turn.prompt_ids[position] if position < len(turn.prompt_ids) else "the end of the prompt"
            raise TokenMismatch(
                f"{where}: prompt_ids must start with prompt + completion of turn {number - 1}; "
                f"at position {position} expected {previous[position]}, got {got}"
            )
        previous = turn.prompt_ids + turn.completion_ids


def flatten(turns: Sequence[Turn]) -> tuple[list[int], list[int], list[int], list[float]]:
    """Returns (prompt_ids, completion_ids, env_mask, logprobs): verified turns as one sequence to train on.

    prompt_ids is the first turn's prompt. The other three lists have equal length: they have the generations
    (mask 1) with their log-probabilities and, between these, the environment's tokens (mask 0, logprob 0.0).
    prompt_ids + completion_ids equals the last turn's prompt + completion.
    """
    prompt_ids = list(turns[0].prompt_ids)
    completion_ids: list[int] = []
    env_mask: list[int] = []
    logprobs: list[float] = []
    for turn in turns:
        env_ids = turn.prompt_ids[len(prompt_ids) + len(completion_ids) :]
        completion_ids += env_ids + turn.completion_ids
        env_mask += [0] * len(env_ids) + [1] * len(turn.completion_ids)
        logprobs += [0.0] * len(env_ids) + turn.logprobs
    return prompt_ids, completion_ids, env_mask, logprobs


def token_versions(turns: Sequence[Turn]) -> list[int | None]:
    """Returns the version of the weights that sampled each of the completion tokens of `flatten`; None for a
    token of the environment, and for the tokens of a turn whose versions are unknown.
    """
    versions: list[int | None] = []
    for turn in turns:
        num_env = len(turn.prompt_ids) - len(turns[0].prompt_ids) - len(versions)
        versions += [None] * num_env
        spans = turn.versions or [(None, len(turn.completion_ids))]
        versions += [version for version, count in spans for _ in range(count)]
    return versions


def ids_digest(*parts: Sequence[int]) -> bytes:
    """Returns a digest of lists of token ids, which tells them apart."""
    return hashlib.blake2b(b"/".join(map(ids_bytes, parts)), digest_size=16).digest()


def ids_bytes(ids: Sequence[int]) -> bytes:
    """Returns the ids in eight bytes each. Raises TypeError, OverflowError if one is no such integer."""
    try:
        return struct.pack(f"{len(ids)}q", *ids)  # twice as fast as an array
    except struct.error:
        return array("q", ids).tobytes()  # says what is wrong with them


def _plain(message: Message, knows_developer: bool) -> Message:
    """Returns the message in the form that `render` gives to the template. knows_developer: whether the
    template has the role "developer". Raises ValueError if a part is not text.
    """
    plain = {key: value for key, value in message.items() if key in _TEMPLATE_KEYS}
    plain["content"] = content_text(message)
    if message.get("role") == "developer" and not knows_developer:
        plain["role"] = "system"
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [
            {
                **call,
                "function": {**call["function"], "arguments": as_object(call["function"].get("arguments"))},
            }
            for call in calls
        ]
    return plain


def content_text(message: Message) -> str:
    """Returns the message's content as one text. Raises ValueError if a part is not text."""
    content = message.get("content") or ""
    if isinstance(content, list):
        kinds = [part.get("type") for part in content if part.get("type") != "text"]
        if kinds:
            raise ValueError(f"message content must be text, got a part of type {kinds[0]!r}")
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"message content must be text, got {type(content).__name__}")
    return content


# A template does not need the token lists, and to copy them costs more than all other fields.
_TEMPLATE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning")


def as_object(arguments: Any) -> Any:
    """Returns a tool call's arguments as a dict. Arguments that are no JSON object are returned unchanged."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _text_after_sentinel(text: str, messages: Sequence[Message], index: int) -> str:
    """Returns the text after the sentinel. Raises TokenMismatch unless the text shows the sentinel once and,
    behind it, the messages after messages[index].

    A message counts as shown if the text has its content without outer white space, or escaped as in JSON.
    Assistant messages need not be shown.
    """
    parts = text.split(SENTINEL)
    if len(parts) != 2:
        raise TokenMismatch(
            f"the chat template must show the assistant message at messages[{index}] once, "
            f"it did {len(parts) - 1} times; use a template that keeps earlier turns"
        )
    for number, message in enumerate(messages[index + 1 :], index + 1):
        content = content_text(message).strip()
        is_shown = content in parts[1] or json.dumps(content, ensure_ascii=False)[1:-1] in parts[1]
        if message.get("role") != "assistant" and not is_shown:
            raise TokenMismatch(
                f"the chat template leaves out or changes the {message.get('role')} message at "
                f"messages[{number}]; use a template that shows it as it is"
            )
    return parts[1]


def _without_sampled_end(tokenizer: Any, tail_ids: list[int], last_id: int) -> list[int]:
    """Returns tail_ids without the end of turn if the policy sampled it last. Only white space may precede
    the end of turn in tail_ids; else, or if last_id is no special token, they are returned whole.
    """
    if last_id not in tail_ids:
        return tail_ids
    end = tail_ids.index(last_id)
    is_special = last_id in tokenizer.added_tokens_decoder
    return tail_ids[end + 1 :] if is_special and not tokenizer.decode(tail_ids[:end]).strip() else tail_ids


def _verify_ids(ids: list[int], vocab_size: int, name: str, num_verified: int = 0) -> None:
    """Raises TokenMismatch unless `ids` are ints in [0, vocab_size), at least one. name: for the message.
    num_verified: how many of the first ids are verified already."""
    if not ids:
        raise TokenMismatch(f"{name} must not be empty")
    new = ids[num_verified:] if num_verified else ids
    if not new or (set(map(type, new)) == {int} and min(new) >= 0 and max(new) < vocab_size):
        return
    position = next(p for p, i in enumerate(ids) if type(i) is not int or not 0 <= i < vocab_size)
    raise TokenMismatch(f"{name}[{position}] must be an int in [0, {vocab_size}), got {ids[position]!r}")


def _verify_logprobs(logprobs: list[float], where: str) -> None:
    """Raises TokenMismatch unless the values are finite and at most LOGPROB_ROUNDING. where: for the
    message."""
    is_number = set(map(type, logprobs)) <= {int, float}
    if is_number and all(map(math.isfinite, logprobs)) and max(logprobs) <= LOGPROB_ROUNDING:
        return
    for position, value in enumerate(logprobs):
        if not isinstance(value, int | float) or not math.isfinite(value) or value > LOGPROB_ROUNDING:
            raise TokenMismatch(f"{where}: logprobs[{position}] must be finite and <= 0, got {value!r}")


def _first_difference(expected: list[int], got: list[int]) -> int:
    """Returns the first position at which the lists differ; the shorter length if there is none."""
    return next(
        (p for p, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
        min(len(expected), len(got)),
    )
