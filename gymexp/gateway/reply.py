"""What a generation says to the environment: content, reasoning and tool calls, read from the sampled ids.

transformers' response templates do the parsing. A tokenizer may carry its own (`response_template` in
tokenizer_config.json). For two widespread formats it is made here; TRL has more, for the chat templates that
it knows, and for any other that writes calls as one of these does. Anything malformed is plain text: a policy
in training writes every kind of nonsense, and none is an error.
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

# The part of the prompt that may hold what a template writes ahead of the generation ("<think>\n").
PREFIX_TOKENS = 64


# What a chat template is asked to write, to see in which format it does. Some want an id of nine letters.
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
    """tool_calls as OpenAI has them: id, type, function {name, arguments: JSON text}."""

    content: str
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


class ReplyParser:
    """Parses generations of one tokenizer. Without a known format every generation is plain text.

    reads_calls: whether there is a format for the calls that its chat template writes.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or r"(?!)")
        self._with_calls, self._without_calls = None, None
        self._types_arguments = self.reads_calls = False
        if spec := find_response_template(tokenizer, [_PROBE]):
            self._with_calls = _load(spec)
            # JSON arguments have types; those in XML tags are text until the tool's schema says more.
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


def find_response_template(tokenizer: Any, tools: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    """The response template for what the policy says where it is given `tools`, or none: of the tokenizer, or
    for the chat template that transformers takes then (some have another one for tools)."""
    if own := getattr(tokenizer, "response_template", None):
        return own
    chat_template = tokenizer.get_chat_template(tools=tools)
    known = known_response_template(chat_template)
    has_calls = bool(known and "tool_calls" in known["fields"])
    return known if has_calls else _of_trl(tokenizer, chat_template, tools) or known


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


def _of_trl(tokenizer: Any, chat_template: str, tools: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    """TRL's response template for this chat template; else, with tools, the first of its formats in which a
    call that the chat template writes is read as that call."""
    from trl import chat_template_utils as known  # 2 s: not where it is not needed

    try:
        return known.add_response_schema(SimpleNamespace(chat_template=chat_template)).response_template  # pyright: ignore
    except ValueError:  # TRL does not know this very template
        if not tools or "tool_calls" not in chat_template:
            return None
    said = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]},
    ]
    try:
        text = render(tokenizer, said, tools, add_generation_prompt=False)
    except ValueError:
        return None
    formats = [
        value for name, value in vars(known).items() if name.endswith("_template") and isinstance(value, dict)
    ]
    return next((spec for spec in formats if _reads_probe(spec, text)), None)


def _reads_probe(spec: dict[str, Any], text: str) -> bool:
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
    # As it stands, later content would replace earlier: the text ahead of a tool call would be lost.
    content = {**spec["fields"]["content"], "repeats": True, "join": "\n"}
    return load_response_template({**spec, "fields": {**spec["fields"], "content": content}})


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
