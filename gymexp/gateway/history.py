"""Checks that the history in an agent's request is the one that its earlier turns were sampled from.

`tokens.splice` continues the ids of the last sampled message and does not look at the messages before it. If
an agent rewrites those (compaction, dropped turns or reasoning, an edited tool result, another system prompt,
other tools), its prompt would still have the old history, and the policy would be trained on a conversation
that the agent never had. So the gateway refuses such a request.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from gymexp.errors import TokenMismatch
from gymexp.rollout.tokens import (
    Message,
    as_object,
    content_text,
    encode,
    ids_digest,
    is_sampled,
    render,
    splice,
)

if TYPE_CHECKING:
    from gymexp.gateway.reply import Reply

REMEMBERED_TURNS = 65536
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class Conversation:
    """The fields of a chat request that decide its prompt, in OpenAI's terms."""

    messages: Sequence[Message]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True

    def until(self, end: int) -> Conversation:
        """Returns this conversation cut to its first `end` messages."""
        rest = self.tools, self.template_kwargs, self.add_generation_prompt
        return Conversation(self.messages[:end], *rest)

    def key(self) -> bytes:
        """Returns a digest of all fields: conversations with the same JSON text have the same key."""
        parts = self.messages, self.tools, self.template_kwargs, self.add_generation_prompt
        return _digest(orjson.dumps(parts))

    def prompt_ids(self, tokenizer: Any) -> list[int]:
        """Returns the ids of the prompt: spliced if a message carries sampled ids, else of the rendered text.

        Raises ValueError and TokenMismatch as `render` and `splice` do.
        """
        messages, tools, template_kwargs = self.messages, self.tools, self.template_kwargs
        if any(map(is_sampled, messages)):
            return splice(tokenizer, messages, tools, template_kwargs)
        text = render(tokenizer, messages, tools, template_kwargs, self.add_generation_prompt)
        return encode(tokenizer, text)


class History:
    """Compares conversations with the turns that the gateway answered before. It remembers `capacity` turns.

    To verify a remembered turn costs a hash. For any other turn (the gateway was restarted, or the messages
    are written in another way, such as other white space in their JSON), the prompt is built again and
    compared with the ids that the message carries. So only two checks depend on the memory. The sampled
    message's own text is not compared without it. Two messages that NeMo Gym merged
    (`_without_last_assistants`) pass only with it.
    """

    def __init__(self, tokenizer: Any, capacity: int = REMEMBERED_TURNS) -> None:
        self._tokenizer = tokenizer
        self._capacity = capacity
        # By prompt: keys of the answered conversation, and of the same without the assistant messages at its
        # end.
        self._answered: OrderedDict[bytes, tuple[bytes, bytes]] = OrderedDict()
        self._replies: OrderedDict[bytes, tuple[bytes, ...]] = OrderedDict()  # by prompt and generation

    def remember(
        self, conversation: Conversation, prompt_ids: list[int], generation_ids: list[int], reply: Reply
    ) -> None:
        """Remembers that `generation_ids`, parsed as `reply`, answered the conversation."""
        base = _without_last_assistants(conversation)
        self._put(self._answered, ids_digest(prompt_ids), (conversation.key(), base.key()))
        if base == conversation:
            digests = _reply_digests(reply.reasoning, reply.content, reply.tool_calls)
            self._put(self._replies, ids_digest(prompt_ids, generation_ids), digests)

    def verify(self, conversation: Conversation) -> None:
        """Raises TokenMismatch unless every sampled message was sampled from the messages before it, and has
        the text that was sampled.

        The error's message must not quote the conversation: NeMo Gym reads a 400 that contains "context
        length" or "max_tokens" as a prompt that is too long.
        """
        messages = conversation.messages
        for index in reversed([i for i, message in enumerate(messages) if is_sampled(message)]):
            prompt_ids = messages[index].get("prompt_token_ids")
            if not prompt_ids:
                return  # `splice` raises for this message
            self._verify_reply(messages, index)
            before = conversation.until(index)
            if before.key() in self._answered.get(ids_digest(prompt_ids), ()):
                return  # the earlier messages were verified when this turn was answered
            try:
                is_same = before.prompt_ids(self._tokenizer) == prompt_ids
            except (ValueError, TokenMismatch):
                is_same = False
            if not is_same:
                raise TokenMismatch(
                    f"the history was rewritten: messages[{index}] was not sampled from the {index} messages "
                    "before it and these tools. An agent must send all earlier turns as they were, for the "
                    "policy is trained on them"
                )

    def _verify_reply(self, messages: Sequence[Message], index: int) -> None:
        """Raises TokenMismatch if the reply in messages[index] is remembered, and its text is another now."""
        message = messages[index]
        ids = message["prompt_token_ids"], message["generation_token_ids"]
        if (sampled := self._replies.get(ids_digest(*ids))) is None:
            return
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        sent = _reply_digests(reasoning, content_text(message), message.get("tool_calls") or [])
        for name, before, now in zip(("reasoning", "content", "tool calls"), sampled, sent, strict=True):
            if before != now:
                raise TokenMismatch(
                    f"the history was rewritten: the {name} of messages[{index}] must be what was sampled, "
                    "for the policy is trained on it"
                )

    def _put(self, memory: OrderedDict[bytes, Any], key: bytes, value: Any) -> None:
        memory[key] = value
        memory.move_to_end(key)
        if len(memory) > self._capacity:
            memory.popitem(last=False)


def _without_last_assistants(conversation: Conversation) -> Conversation:
    """Returns the conversation up to its last message that is not the assistant's.

    NeMo Gym merges the assistant messages at a conversation's end with the one that is sampled next, so the
    merged message comes back as an answer to this shorter conversation.
    """
    end = len(conversation.messages)
    while end and conversation.messages[end - 1].get("role") == "assistant":
        end -= 1
    return conversation.until(end)


def _reply_digests(reasoning: str, content: str, calls: Sequence[dict[str, Any]]) -> tuple[bytes, ...]:
    """Returns digests of a reply's reasoning, content and tool calls, which stay the same when the reply
    passes through NeMo Gym.

    NeMo Gym's model server writes the reasoning into the content as <think>, reads it from the content again,
    keeps only the first thought, and joins the texts in another way. White space is left out, and the
    arguments of calls are compared as objects.
    """
    rest = f"<think>{reasoning}</think>{content}" if reasoning else content
    thoughts: list[str] = []
    while found := _THOUGHT.findall(rest):
        thoughts += found
        rest = _THOUGHT.sub("", rest)
    first = next(filter(None, thoughts), "")
    functions = [call["function"] for call in calls]
    called = [(function["name"], as_object(function.get("arguments"))) for function in functions]
    arguments = json.dumps(called, sort_keys=True)  # not orjson: the policy writes integers of any size
    texts = ("".join(text.split()).encode() for text in (first, rest))
    return *map(_digest, texts), _digest(arguments.encode())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
