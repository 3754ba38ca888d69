"""Parses sampled ids into a reply for the environment: content, reasoning and tool calls.

transformers' response templates do the parsing. A tokenizer may have its own (`response_template` in
tokenizer_config.json). This module makes one for two widespread formats. TRL has more for the chat templates
that it knows, which also fit any other chat template that writes calls as one of these does. A malformed
reply is plain text and never an error, as a policy in training writes every kind of nonsense.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from transformers.utils.chat_parsing import parse_response
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template

from gymexp.rollout.tokens import render

# How many tokens at the end of the prompt to search for text that the chat template wrote at the start of the
# reply ("<think>\n").
PREFIX_TOKENS = 64


# A tool and a call of it. A chat template renders them, and the text shows in which format it writes calls.
# Some templates require an id of nine letters.
_PROBE = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds texts.",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "description": "what to find"},
                "limit": {"type": "integer", "description": "how many"},
            },
            "required": ["text"],
        },
    },
}
_PROBE_CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "look_up", "arguments": {"text": "two words", "limit": 3}},
}


@dataclass(frozen=True)
class Reply:
    """A parsed generation. tool_calls: as OpenAI's {id, type, function {name, arguments: JSON text}}."""

    content: str
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


class ReplyParser:
    """Parses generations of one tokenizer. If no format is known for it, every generation is plain text.

    reads_calls: whether a format is known for the calls that the tokenizer's chat template writes.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or r"(?!)")
        self._with_calls, self._without_calls = None, None
        self._types_arguments = self.reads_calls = False
        if spec := find_response_template(tokenizer, [_PROBE]):
            self._with_calls = _load(spec)
            # JSON arguments have types. For arguments in XML tags, the tool's schema gives the types.
            self._types_arguments = spec["fields"].get("tool_calls", {}).get("content") != "json"
            self.reads_calls = "tool_calls" in spec["fields"]
        if spec := find_response_template(tokenizer, None):
            fields = {name: value for name, value in spec["fields"].items() if name != "tool_calls"}
            self._without_calls = _load({**spec, "fields": fields})

    def parse(
        self,
        generation_ids: list[int],
        prompt_ids: list[int],
        tools: list[dict[str, Any]] | None = None,
        parallel: bool = True,
        stop: list[str] | None = None,
    ) -> Reply:
        """Returns the reply that the generation stands for.

        tools: those that the policy may call; without tools the parser looks for no calls. parallel: False
        keeps only the first call. The reply is plain text if a call is malformed: it is no JSON, its
        arguments are no object, or its name is none of the tools (NeMo Gym uses the name as a URL path, so an
        invented name could reach another route of the server).
        """
        plain = cut(self._tokenizer.decode(generation_ids, skip_special_tokens=True), stop)
        template = self._with_calls if tools else self._without_calls
        if template is None:
            return Reply(plain)
        text = cut(self._tokenizer.decode(generation_ids, skip_special_tokens=False), stop)
        prefix = self._prefix(template, prompt_ids)
        try:
            schemas: list[Any] | None = tools if self._types_arguments else None
            message = parse_response(text, template, prefix=prefix, tools=schemas)
            calls = [_openai_call(call, tools or []) for call in message.get("tool_calls", [])]
        except (ValueError, TypeError, KeyError, RecursionError):
            return self.parse(generation_ids, prompt_ids, None, parallel, stop) if tools else Reply(plain)
        reasoning = self._clean(message.get("reasoning_content") or message.get("thinking") or "")
        content = self._clean(message.get("content") or "")
        if not calls and not reasoning and content == plain.strip():
            content = plain  # with its white space, as no part of the text was taken out
        return Reply(content, reasoning, calls if parallel else calls[:1])

    def _prefix(self, template: ResponseTemplate, prompt_ids: list[int]) -> str:
        """Returns the text of this reply that the chat template wrote at the end of the prompt; "" if the
        reply's start is not found in the prompt.
        """
        text = self._tokenizer.decode(prompt_ids[-PREFIX_TOKENS:], skip_special_tokens=False)
        return template.truncate_past_last_anchor(text) if template.start_anchor_re.search(text) else ""

    def _clean(self, text: str) -> str:
        return self._special.sub("", text).strip()


def cut(text: str, stop: list[str] | None) -> str:
    """Returns the text before the first stop string. The sampled ids still have the rest."""
    return text[: min((at for at in map(text.find, stop or []) if at >= 0), default=len(text))]


def find_response_template(tokenizer: Any, tools: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    """Returns the response template for the policy's replies, or None if no format is known: the tokenizer's
    own one, else one that fits the chat template.

    tools: as the policy gets them. They matter, as some tokenizers have another chat template for tools.
    """
    if own := getattr(tokenizer, "response_template", None):
        return own
    chat_template = tokenizer.get_chat_template(tools=tools)
    known = known_response_template(chat_template)
    has_calls = bool(known and "tool_calls" in known["fields"])
    return known if has_calls else _find_trl_template(tokenizer, chat_template, tools) or known


def known_response_template(chat_template: str | None) -> dict[str, Any] | None:
    """Returns a response template for the tool call format of this chat template, or None if it has neither
    of the two formats that gymexp describes itself (ChatML with JSON calls, Llama 3).
    """
    template = chat_template or ""
    content: dict[str, Any] = {"content": {"content": "text"}}
    if "<|im_start|>" in template:
        fields = dict(content)
        if "<think>" in template:
            fields["reasoning_content"] = {"open": "<think>", "close": "</think>", "content": "text"}
        if "<tool_call>" in template and "<function=" not in template:
            fields["tool_calls"] = {
                "open": "<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            }
        return {"start_anchor": "<|im_start|>assistant\n", "fields": fields} if len(fields) > 1 else None
    if "<|start_header_id|>" in template and "parameters" in template:
        call = {"name": "{content.name}", "arguments": "{content.parameters}"}
        tool_calls = {
            "open_pattern": r'(?:<\|python_tag\|>)?(?=\{\s*"name"\s*:)',
            "close_pattern": r"<\|eo[tm]_id\|>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": call},
        }
        anchor = "<|start_header_id|>assistant<|end_header_id|>\n\n"
        return {"start_anchor": anchor, "fields": {**content, "tool_calls": tool_calls}}
    return None


def _find_trl_template(
    tokenizer: Any, chat_template: str, tools: list[dict[str, Any]] | None
) -> dict[str, Any] | None:
    """Returns TRL's response template for this chat template. If TRL does not know it and there are tools,
    returns the first of TRL's formats that reads a call, as the chat template writes it, as the same call.
    """
    from trl import chat_template_utils  # imported only if needed, as it takes 2 s

    holder: Any = SimpleNamespace(chat_template=chat_template)
    try:
        return chat_template_utils.add_response_schema(holder).response_template
    except ValueError:  # TRL does not know this chat template
        if not tools or "tool_calls" not in chat_template:
            return None
    conversation = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]},
    ]
    try:
        text = render(tokenizer, conversation, tools, add_generation_prompt=False)
    except ValueError:
        return None
    formats = [
        value
        for name, value in vars(chat_template_utils).items()
        if name.endswith("_template") and isinstance(value, dict)
    ]
    return next((spec for spec in formats if _reads_probe(spec, text)), None)


def _reads_probe(spec: dict[str, Any], text: str) -> bool:
    """Returns whether the response template `spec` reads _PROBE_CALL from a chat template's text."""
    template = load_response_template(spec)
    if not template.start_anchor_re.search(text):
        return False
    try:
        message = parse_response(
            template.truncate_past_last_anchor(text), template, prefix="", tools=[_PROBE]
        )
        return [call["function"] for call in message["tool_calls"]] == [_PROBE_CALL["function"]]
    except (ValueError, TypeError, KeyError):
        return False


def _load(spec: dict[str, Any]) -> ResponseTemplate:
    # Without "repeats", later content would replace earlier content, and the text ahead of a call be lost.
    content = {**spec["fields"]["content"], "repeats": True, "join": "\n"}
    return load_response_template({**spec, "fields": {**spec["fields"], "content": content}})


def _openai_call(call: dict[str, Any], tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the call in OpenAI's format. Raises ValueError, KeyError or TypeError if it is malformed."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if name not in [tool["function"]["name"] for tool in tools]:
        raise ValueError(f"{name!r} is none of the offered tools")
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments must be a JSON object, got {type(arguments).__name__}")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # raises for half a surrogate pair, which JSON allows but no program can write as UTF-8
    return {"id": f"call_{uuid4().hex}", "type": "function", "function": {"name": name, "arguments": text}}
