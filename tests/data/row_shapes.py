"""Shapes of rows that people write, and what NeMo Gym 0.4 does with each.

`taken`: its servers play such a row; `test_row_shapes.py` asks them. `at`: the field that is to be named
where they do not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ASKED = [{"role": "user", "content": "2 + 2?"}]
F = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True}
CALL = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c1"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "4"}
THOUGHT = {"type": "reasoning", "id": "r1", "summary": [{"type": "summary_text", "text": "hm"}]}


MAY_BE_NULL = ("background", "include", "instructions", "max_output_tokens", "max_tool_calls", "model")
MAY_BE_NULL += (
    "previous_response_id",
    "prompt",
    "reasoning",
    "service_tier",
    "store",
    "stream",
    "temperature",
)
MAY_BE_NULL += ("text", "top_logprobs", "top_p", "truncation", "user")


class Shape(NamedTuple):
    row: Any
    taken: bool
    at: str = ""


def params(taken: bool, at: str = "", **changes: Any) -> Shape:
    return Shape({"responses_create_params": {"input": ASKED} | changes}, taken, at)


def asks(taken: bool, at: str, *items: Any) -> Shape:
    return params(taken, at, input=list(items))


def part(taken: bool, at: str, *parts: Any, role: str = "user") -> Shape:
    return asks(taken, at, {"role": role, "content": list(parts)})


def tool(taken: bool, at: str, *without: str, **changes: Any) -> Shape:
    return params(taken, at, tools=[{k: v for k, v in (F | changes).items() if k not in without}])


SHAPES: dict[str, Shape] = {
    # The row itself.
    "no parameters": Shape({"question": "2 + 2?"}, False, "responses_create_params"),
    "parameters null": Shape({"responses_create_params": None}, False, "responses_create_params"),
    "parameters an array": Shape({"responses_create_params": []}, False, "responses_create_params"),
    "parameters a text": Shape({"responses_create_params": "2 + 2?"}, False, "responses_create_params"),
    "more fields": Shape({"responses_create_params": {"input": ASKED}, "id": 3, "none": None}, True),
    # What is asked.
    "input missing": Shape({"responses_create_params": {}}, False, "input"),
    "input null": params(False, "input", input=None),
    "input a text": params(True, input="2 + 2?"),
    "input a number": params(False, "input", input=4),
    "input one message": params(False, "input", input=ASKED[0]),
    "input of texts": asks(False, "input[0]", "2 + 2?"),
    "system and user": asks(True, "", {"role": "system", "content": "Be brief."}, *ASKED),
    "developer": asks(True, "", {"role": "developer", "content": "Be brief."}, *ASKED),
    "an assistant before": asks(True, "", *ASKED, {"role": "assistant", "content": "4"}, *ASKED),
    "role missing": asks(False, "input[0].role", {"content": "x"}),
    "role null": asks(False, "input[0].role", {"role": None, "content": "x"}),
    "role unknown": asks(False, "input[0].role", {"role": "robot", "content": "x"}),
    "role tool": asks(False, "input[1].role", *ASKED, {"role": "tool", "tool_call_id": "c1", "content": "4"}),
    "content missing": asks(False, "input[0].content", {"role": "user"}),
    "content null": asks(False, "input[0].content", {"role": "user", "content": None}),
    "content a number": asks(False, "input[0].content", {"role": "user", "content": 4}),
    "content an object": asks(False, "input[0].content", {"role": "user", "content": {"text": "x"}}),
    "message with its type": asks(True, "", {"type": "message", "role": "user", "content": "x"}),
    "message with null as type": asks(True, "", {"type": None, "role": "user", "content": "x"}),
    "message of an unknown type": asks(
        False, "input[0].type", {"type": "msg", "role": "user", "content": "x"}
    ),
    "message with more keys": asks(True, "", {"role": "user", "content": "x", "name": "me"}),
    # Parts of a message.
    "part input_text": part(True, "", {"type": "input_text", "text": "x"}),
    "part text, as in chat completions": part(
        False, "input[0].content[0].type", {"type": "text", "text": "x"}
    ),
    "part output_text of a user": part(
        False, "input[0].content[0].type", {"type": "output_text", "text": "x"}
    ),
    "part a text": part(False, "input[0].content[0]", "x"),
    "part without text": part(False, "input[0].content[0].text", {"type": "input_text"}),
    "part with null as text": part(False, "input[0].content[0].text", {"type": "input_text", "text": None}),
    "part input_file": part(False, "", {"type": "input_file", "file_id": "f1"}),
    "no parts": part(True, ""),
    # What was said and done before.
    "a call and its output": asks(True, "", *ASKED, CALL, OUTPUT),
    "call without id": asks(
        False, "input[1].call_id", *ASKED, {k: CALL[k] for k in ("type", "name", "arguments")}
    ),
    "call with an object of arguments": asks(
        False, "input[1].arguments", *ASKED, CALL | {"arguments": {}}, OUTPUT
    ),
    "call with null as status": asks(True, "", *ASKED, CALL | {"status": None, "id": None}, OUTPUT),
    "call with an unknown status": asks(False, "input[1].status", *ASKED, CALL | {"status": "done"}, OUTPUT),
    "output an object": asks(False, "input[2].output", *ASKED, CALL, OUTPUT | {"output": {"sum": 4}}),
    "output a number": asks(False, "input[2].output", *ASKED, CALL, OUTPUT | {"output": 4}),
    "reasoning": asks(True, "", *ASKED, THOUGHT, {"role": "assistant", "content": "4"}, *ASKED),
    "reasoning with a text as summary": asks(False, "input[1].summary", *ASKED, THOUGHT | {"summary": "hm"}),
    "item of an unknown type": asks(False, "input[1].type", *ASKED, {"type": "web_search_call", "id": "1"}),
    # Tools.
    "tools null": params(True, tools=None),
    "tools empty": params(True, tools=[]),
    "tools an object": params(False, "tools", tools={}),
    "tools of texts": params(False, "tools[0]", tools=["f"]),
    "tool": tool(True, ""),
    "tool with null as strict and description": tool(True, "", strict=None, description=None),
    "tool without strict": tool(False, "tools[0].strict", "strict"),
    "tool without parameters": tool(False, "tools[0].parameters", "parameters"),
    "tool with null as parameters": tool(False, "tools[0].parameters", parameters=None),
    "tool with an array as parameters": tool(False, "tools[0].parameters", parameters=[]),
    "tool without name": tool(False, "tools[0].name", "name"),
    "tool without type": tool(False, "tools[0].type", "type"),
    "tool with one key more": tool(False, "tools[0].returns", returns="a number"),
    "tool of chat completions": params(
        False, "tools[0]", tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
    ),
    "tool of an unknown type": params(False, "tools[0].type", tools=[F | {"type": "program"}]),
    "tool of the provider's": params(False, "tools[0].type", tools=[{"type": "web_search"}]),
    # The other parameters.
    "parameter unknown": params(False, "max_tokens", max_tokens=5),
    "choice null": params(True, tool_choice=None),
    "choice unknown": params(False, "tool_choice", tool_choice="maybe"),
    "choice of one function": params(
        False, "tool_choice", tools=[F], tool_choice={"type": "function", "name": "f"}
    ),
    "parallel calls null": params(True, parallel_tool_calls=None),
    "parallel calls a word": params(False, "parallel_tool_calls", parallel_tool_calls="never"),
    "metadata an array": params(False, "metadata", metadata=["easy"]),
    "metadata null": params(True, metadata=None),
    "metadata with a number": params(False, "metadata.level", metadata={"level": 3}),
    "metadata with a null": params(True, metadata={"level": None}),
    "stream": params(False, "stream", stream=True),
    "effort unknown": params(False, "reasoning.effort", reasoning={"effort": "huge"}),
    "truncation unknown": params(False, "truncation", truncation="left"),
    "user a number": params(False, "user", user=3),
    "everything else null": params(True, **dict.fromkeys(MAY_BE_NULL)),
}
