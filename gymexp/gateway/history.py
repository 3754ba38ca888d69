"""The history that an agent sends is the one that its earlier turns were sampled from, or the request fails.

`tokens.splice` continues the ids of the last sampled message and looks at nothing before it. An agent that
rewrites what stands there (compaction, dropped turns or reasoning, an edited tool result, another system
prompt, other tools) would get the old history in its prompt, and the policy would be trained on a
conversation that the agent never had.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from gymexp.errors import TokenMismatch
from gymexp.rollout.tokens import Message, as_object, content_text, encode, is_sampled, render, splice

if TYPE_CHECKING:
    from gymexp.gateway.reply import Reply

REMEMBERED_TURNS = 65536
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class Conversation:
    """What a request says of its prompt, in OpenAI's terms."""

    messages: Sequence[Message]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True

    def until(self, end: int) -> Conversation:
        """The same with the first `end` messages alone."""
        rest = self.tools, self.template_kwargs, self.add_generation_prompt
        return Conversation(self.messages[:end], *rest)

    def key(self) -> bytes:
        parts = self.messages, self.tools, self.template_kwargs, self.add_generation_prompt
        return _digest(orjson.dumps(parts))

    def prompt_ids(self, tokenizer: Any) -> list[int]:
        """Raises ValueError, TokenMismatch as `render` and `splice` do."""
        messages, tools, template_kwargs = self.messages, self.tools, self.template_kwargs
        if any(map(is_sampled, messages)):
            return splice(tokenizer, messages, tools, template_kwargs)
        text = render(tokenizer, messages, tools, template_kwargs, self.add_generation_prompt)
        return encode(tokenizer, text)


class History:
    """Compares conversations with what was answered before. What it remembers is bounded.

    A turn that is remembered costs a hash. Of one that is not (the gateway was restarted, or its messages are
    written in another way, such as other white space in their JSON), the prompt is built again and compared
    with the ids that the message carries. So nothing depends on the memory but the comparison of the sampled
    message's own text, which is left out without it, and the two merged messages that `_base` describes.
    """

    def __init__(self, tokenizer: Any, remembered: int = REMEMBERED_TURNS) -> None:
        self._tokenizer = tokenizer
        self._remembered = remembered
        # By prompt: the conversation that was answered, and it without the assistant messages at its end.
        self._answered: OrderedDict[bytes, tuple[bytes, bytes]] = OrderedDict()
        self._replies: OrderedDict[bytes, tuple[bytes, ...]] = OrderedDict()  # by prompt and generation

    def remember(
        self, conversation: Conversation, prompt_ids: list[int], generation_ids: list[int], reply: Reply
    ) -> None:
        base = _without_last_assistants(conversation)
        self._put(self._answered, _ids_digest(prompt_ids), (conversation.key(), base.key()))
        if base == conversation:
            said = _said(reply.reasoning, reply.content, reply.tool_calls)
            self._put(self._replies, _ids_digest(prompt_ids, generation_ids), said)

    def verify(self, conversation: Conversation) -> None:
        """Raises TokenMismatch unless every sampled message answers what stands before it, and says what was
        sampled. The text must not quote the conversation: NeMo Gym takes a 400 with "context length" or
        "max_tokens" in it for a prompt that is too long."""
        messages = conversation.messages
        for index in reversed([i for i, message in enumerate(messages) if is_sampled(message)]):
            prompt_ids = messages[index].get("prompt_token_ids")
            if not prompt_ids:
                return  # `splice` says so
            self._verify_reply(messages, index)
            before = conversation.until(index)
            if before.key() in self._answered.get(_ids_digest(prompt_ids), ()):
                return  # what stands before it was verified then
            try:
                same = before.prompt_ids(self._tokenizer) == prompt_ids
            except (ValueError, TokenMismatch):
                same = False
            if not same:
                raise TokenMismatch(
                    f"the history was rewritten: messages[{index}] was not sampled from the {index} messages "
                    "before it and these tools. An agent must send all earlier turns as they were, for the "
                    "policy is trained on them"
                )

    def _verify_reply(self, messages: Sequence[Message], index: int) -> None:
        message = messages[index]
        ids = message["prompt_token_ids"], message["generation_token_ids"]
        if (known := self._replies.get(_ids_digest(*ids))) is None:
            return
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        said = _said(reasoning, content_text(message), message.get("tool_calls") or [])
        for name, was, sent in zip(("reasoning", "content", "tool calls"), known, said, strict=True):
            if was != sent:
                raise TokenMismatch(
                    f"the history was rewritten: the {name} of messages[{index}] must be what was sampled "
                    "there, for the policy is trained on it"
                )

    def _put(self, memory: OrderedDict[bytes, Any], key: bytes, value: Any) -> None:
        memory[key] = value
        memory.move_to_end(key)
        if len(memory) > self._remembered:
            memory.popitem(last=False)


def _without_last_assistants(conversation: Conversation) -> Conversation:
    """NeMo Gym merges the assistant messages at a conversation's end with the one that is sampled next."""
    end = len(conversation.messages)
    while end and conversation.messages[end - 1].get("role") == "assistant":
        end -= 1
    return conversation.until(end)


def _said(reasoning: str, content: str, calls: Sequence[dict[str, Any]]) -> tuple[bytes, ...]:
    """Digests of reasoning, content and tool calls, the same on their way through NeMo Gym.

    Its model server writes reasoning as <think> into the content, reads it from there again, keeps the first
    thought alone, and joins texts anew; arguments are compared as objects.
    """
    rest = f"<think>{reasoning}</think>{content}" if reasoning else content
    thoughts: list[str] = []
    while found := _THOUGHT.findall(rest):
        thoughts += found
        rest = _THOUGHT.sub("", rest)
    first = next(filter(None, thoughts), "")
    functions = [call["function"] for call in calls]
    called = [(function["name"], as_object(function.get("arguments"))) for function in functions]
    arguments = json.dumps(called, sort_keys=True)  # not orjson's: the policy writes integers of any size
    spoken = ("".join(text.split()).encode() for text in (first, rest))
    return *map(_digest, spoken), _digest(arguments.encode())


def _ids_digest(*parts: Sequence[int]) -> bytes:
    return _digest(b"/".join(array("q", ids).tobytes() for ids in parts))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
