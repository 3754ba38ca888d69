"""Token ids of a rollout: how the next prompt is built, and the proof that what is trained on is what was
sampled.

Pure: no I/O and no torch. A tokenizer is anything with transformers' `apply_chat_template`,
`get_chat_template`, `encode` and `decode`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from gymexp.errors import TokenMismatch
from gymexp.rollout.outcome import Turn

Message = dict[str, Any]

# Stands for the sampled text while the template renders what comes after it. Random, so that no conversation
# has it.
SENTINEL = f"sampled{uuid4().hex}"

# A 32-bit log-softmax of logits near 100 rounds by up to 1e-5, so a certain token may come out above 0 by
# that much. More than that is not a log-probability (a probability, a logit, another sign).
LOGPROB_ROUNDING = 1e-5


def is_sampled(message: Message) -> bool:
    """Whether it is an assistant's and carries the ids of what the policy said."""
    return message.get("role") == "assistant" and bool(message.get("generation_token_ids"))


def last_sampled(messages: Sequence[Message]) -> int | None:
    """Index of the last assistant message that carries its token ids, or None."""
    return next((i for i in reversed(range(len(messages))) if is_sampled(messages[i])), None)


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The conversation as the chat template writes it.

    Content lists of text parts are joined with newlines (as vLLM does), null content is "", arguments given
    as JSON text become objects (templates want those; text that is no JSON object stays text), and
    "developer" becomes "system" where the template has no such role, because templates drop roles that they
    do not know. Raises ValueError if a message has a part that is not text, or if the template refuses the
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
    """Ids of rendered text; the template has already written every special token."""
    return tokenizer.encode(text, add_special_tokens=False)


def splice(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Prompt ids of the next turn: what was sampled stays as sampled, only what came after is new.

    messages: the last assistant message that carries `prompt_token_ids` and `generation_token_ids` is the
    previous turn; what follows it (tool results, a user message, assistant messages without ids) is the
    environment's. tools and template_kwargs: those of the first turn. The result starts with that message's
    prompt + generation.

    The template renders the conversation with a sentinel in place of the sampled message; the text after the
    sentinel is what comes after. It starts with the template's end of turn, which is left out where it was
    sampled and stays where the generation was cut by length or a stop string. So separators behind the end of
    turn are kept, and what the template does to earlier turns (dropping reasoning, trimming, reordering
    arguments) does not matter. Templates that show a tool's result only behind its call (gpt-oss) get the
    sentinel inside the call's arguments.

    Raises ValueError if no message carries ids or the template refuses the conversation; TokenMismatch if the
    template leaves out the sampled message or one that came after, for the prompt would silently lack it.
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
        spoken = [*messages[:index], stand_in, *messages[index + 1 :]]
        return encode(
            tokenizer, _text_after_sentinel(render(tokenizer, spoken, tools, template_kwargs), spoken, index)
        )

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
    """Ids at which sampling stops: the tokenizer's EOS, and the special token that ends the template's turns;
    of both templates where there is one for tools.

    These differ for base models with a chat template, and for Gemma.
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
    """Raises TokenMismatch unless the turns of one rollout may be trained on.

    Each prompt starts with the previous prompt + completion; completion_ids and logprobs have equal, non-zero
    length; log-probabilities are finite and at most 0 (LOGPROB_ROUNDING is tolerated); ids are ints in [0,
    vocab_size).
    """
    if not turns:
        raise TokenMismatch("a rollout must have at least one turn, got none")
    previous: list[int] = []
    for number, turn in enumerate(turns):
        where = f"turn {number}"
        _verify_ids(turn.prompt_ids, vocab_size, f"{where}: prompt_ids")
        _verify_ids(turn.completion_ids, vocab_size, f"{where}: completion_ids")
        if len(turn.logprobs) != len(turn.completion_ids):
            raise TokenMismatch(
                f"{where}: logprobs must be as many as completion_ids ({len(turn.completion_ids)}), "
                f"got {len(turn.logprobs)}"
            )
        for position, logprob in enumerate(turn.logprobs):
            if (
                not isinstance(logprob, int | float)
                or not math.isfinite(logprob)
                or logprob > LOGPROB_ROUNDING
            ):
                raise TokenMismatch(f"{where}: logprobs[{position}] must be finite and <= 0, got {logprob!r}")
        if turn.prompt_ids[: len(previous)] != previous:
            position = _first_difference(previous, turn.prompt_ids)
            got = turn.prompt_ids[position] if position < len(turn.prompt_ids) else "the end of the prompt"
            raise TokenMismatch(
                f"{where}: prompt_ids must start with prompt + completion of turn {number - 1}; "
                f"at position {position} expected {previous[position]}, got {got}"
            )
        previous = turn.prompt_ids + turn.completion_ids


def flatten(turns: Sequence[Turn]) -> tuple[list[int], list[int], list[int], list[float]]:
    """(prompt_ids, completion_ids, env_mask, logprobs): verified turns as the trainer's one sequence.

    prompt_ids is the first turn's. The other three have one length: generations (mask 1) with their
    log-probabilities, and between them what the environment put there (mask 0, logprob 0.0). prompt_ids +
    completion_ids is the last turn's prompt + completion.
    """
    prompt_ids = list(turns[0].prompt_ids)
    completion_ids: list[int] = []
    env_mask: list[int] = []
    logprobs: list[float] = []
    for turn in turns:
        put = turn.prompt_ids[len(prompt_ids) + len(completion_ids) :]
        completion_ids += put + turn.completion_ids
        env_mask += [0] * len(put) + [1] * len(turn.completion_ids)
        logprobs += [0.0] * len(put) + turn.logprobs
    return prompt_ids, completion_ids, env_mask, logprobs


def _plain(message: Message, knows_developer: bool) -> Message:
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
    """Raises ValueError for parts that are not text."""
    content = message.get("content") or ""
    if isinstance(content, list):
        kinds = [part.get("type") for part in content if part.get("type") != "text"]
        if kinds:
            raise ValueError(f"message content must be text, got a part of type {kinds[0]!r}")
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"message content must be text, got {type(content).__name__}")
    return content


# The token lists are left out: a template has no use for them, and copying them costs more than the rest.
_TEMPLATE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning")


def as_object(arguments: Any) -> Any:
    """A tool call's arguments as a dict; what is no JSON object stays as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _text_after_sentinel(text: str, messages: Sequence[Message], index: int) -> str:
    """Raises TokenMismatch unless the text shows the sentinel once and, behind it, all that came after.

    A message counts as shown if its content is there without outer white space, or escaped as in JSON.
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
    """tail_ids from behind the end of turn, if that was sampled last; only white space may precede it."""
    if last_id not in tail_ids:
        return tail_ids
    end = tail_ids.index(last_id)
    is_special = last_id in tokenizer.added_tokens_decoder
    return tail_ids[end + 1 :] if is_special and not tokenizer.decode(tail_ids[:end]).strip() else tail_ids


def _verify_ids(ids: list[int], vocab_size: int, what: str) -> None:
    if not ids:
        raise TokenMismatch(f"{what} must not be empty")
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
        return
    position = next(p for p, i in enumerate(ids) if type(i) is not int or not 0 <= i < vocab_size)
    raise TokenMismatch(f"{what}[{position}] must be an int in [0, {vocab_size}), got {ids[position]!r}")


def _first_difference(expected: list[int], got: list[int]) -> int:
    return next(
        (p for p, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
        min(len(expected), len(got)),
    )
