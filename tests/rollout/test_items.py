"""What an item says, and which outputs of tools are errors: those that NeMo Gym's servers write."""

from __future__ import annotations

import pytest

from gymexp.rollout.items import is_error, num_tool_calls, num_tool_errors

ERRORS = [
    # simple_agent, for arguments that are no JSON
    '{"error": "Invalid tool call arguments: JSONDecodeError(\'Expecting value\')"}',
    # FastAPI: an unknown path, and arguments that a server's model refuses
    '{"detail":"Not Found"}',
    '{"detail":[{"type":"missing","loc":["body","query"],"msg":"Field required"}]}',
    # workplace_assistant, whose tools raise or catch
    "{\"output\":\"Error executing tool 'email_send': unexpected keyword argument 'to'\"}",
    '{"output":"Error searching emails: unhashable type"}',
    # NeMo Gym's middleware, with status 500
    "\"KeyError('session')\"",
    '"Hit an exception in workplace calling an inner server: gone"',
    '"An unknown error occurred"',
    "Internal Server Error",
    # google_search, openenv, aviary, tools of MCP
    '{"search_results": "Error: Unexpected error - timed out"}',
    '{"error": "Episode has ended.", "result": null}',
    '{"message": "closed", "success": false}',
    '{"content": [], "isError": true}',
    [{"type": "output_text", "text": "ValueError: no such id"}],
]
ANSWERS = [
    '{"output":"Event not found."}',
    '{"output":[{"subject":"Error report: printer"}]}',
    '{"subject":"Error report: printer","body":"…"}',
    '{"error": null, "result": 3}',
    '{"success": true}',
    '{"detail": "a fine line", "title": "x"}',
    "Errors are human: nobody is perfect",
    "An Error: not at the start",
    "Error\nin the first line: no",
    "",
    "[]",
    "3",
    "{",
    None,
    ["Error", {"text": "s in a list"}],
    '"' + "Error: " + "x" * (1 << 20) + '"',
]


@pytest.mark.parametrize("output", ERRORS)
def test_an_output_that_says_that_its_call_failed_is_an_error(output):
    assert is_error(output)


@pytest.mark.parametrize("output", ANSWERS, ids=lambda output: str(output)[:30])
def test_an_output_that_may_be_an_answer_is_none(output):
    assert not is_error(output)


def test_calls_and_their_errors_are_counted_and_nothing_else():
    items = [
        {"type": "message", "content": "Error: said by the policy"},
        {"type": "function_call", "name": "look", "arguments": "{"},
        {"type": "function_call_output", "output": ERRORS[0]},
        {"type": "function_call", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "output": "a look"},
        {"type": "function_call", "name": "look", "arguments": "{}"},
        {"role": "user", "content": "go on"},
    ]
    assert (num_tool_calls(items), num_tool_errors(items)) == (3, 1)
