"""What a generation says to the environment: content, reasoning and tool calls, read from the sampled ids.

transformers' response templates do the parsing. A tokenizer may carry its own (`response_template` in
tokenizer_config.json; TRL's `add_response_schema` sets it for the templates it knows); for two widespread
formats it is made here. Anything malformed is plain text: a policy in training writes every kind of nonsense,
and none is an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from transformers.utils.chat_parsing import parse_response
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template

# The part of the prompt that may hold what a template writes ahead of the generation ("<think>\n").
PREFIX_TOKENS = 64


@dataclass(frozen=True)
class Reply:
    """tool_calls as OpenAI has them: id, type, function {name, arguments: JSON text}."""

    content: str
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


class ReplyParser:
    """Parses generations of one tokenizer. Without a known format every generation is plain text."""

    def __init__(self, tokenizer: Any):
        spec = getattr(tokenizer, "response_template", None)
        spec = spec or known_response_template(tokenizer.chat_template)
        self._tokenizer = tokenizer
        self._special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or r"(?!)")
        self._with_calls = self._without_calls = None
        self._types_arguments = False
        if spec:
            # As it stands, later content would replace earlier: the text ahead of a tool call would be lost.
            content = {**spec["fields"]["content"], "repeats": True, "join": "\n"}
            fields = {**spec["fields"], "content": content}
            self._with_calls = load_response_template({**spec, "fields": fields})
            # JSON arguments have types; those in XML tags are text until the tool's schema says more.
            self._types_arguments = fields.get("tool_calls", {}).get("content") != "json"
            fields = {name: value for name, value in fields.items() if name != "tool_calls"}
            self._without_calls = load_response_template({**spec, "fields": fields})

    def parse(
        self,
        generation_ids: list[int],
        prompt_ids: list[int],
        tools: list[dict[str, Any]] | None = None,
        parallel: bool = True,
        stop: list[str] | None = None,
    ) -> Reply:
        """tools: those that may be called, none: no call is looked for. parallel=False: the first call alone.

        Plain text where a call is malformed: no JSON, arguments that are no object, or a name that was not
        offered (NeMo Gym uses the name as a URL path, so an invented one could reach another route of the
        server).
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
            content = plain  # with its white space: nothing was taken out of it
        return Reply(content, reasoning, calls if parallel else calls[:1])

    def _prefix(self, template: ResponseTemplate, prompt_ids: list[int]) -> str:
        """What the chat template wrote of this very message; "" where its start cannot be found."""
        text = self._tokenizer.decode(prompt_ids[-PREFIX_TOKENS:], skip_special_tokens=False)
        return template.truncate_past_last_anchor(text) if template.start_anchor_re.search(text) else ""

    def _clean(self, text: str) -> str:
        return self._special.sub("", text).strip()


def cut(text: str, stop: list[str] | None) -> str:
    """text up to the first of the stop strings; the sampled ids still hold what follows."""
    return text[: min((at for at in map(text.find, stop or []) if at >= 0), default=len(text))]


def known_response_template(chat_template: str | None) -> dict[str, Any] | None:
    """A response template for the tool call format that this chat template writes, or None."""
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


def _openai_call(call: dict[str, Any], tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Raises ValueError (or KeyError, TypeError) if the call is malformed."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if name not in [tool["function"]["name"] for tool in tools]:
        raise ValueError(f"{name!r} is none of the offered tools")
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments must be a JSON object, got {type(arguments).__name__}")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # half a surrogate pair passes JSON, and fails in whoever writes it out
    return {"id": f"call_{uuid4().hex}", "type": "function", "function": {"name": name, "arguments": text}}
