"""Dataset rows, checked before anything starts: what NeMo Gym would refuse is said here, with its line."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import orjson

from gymexp.config import nearest
from gymexp.errors import DataError

_MOST_PROBLEMS = 20
_ROLES = ("user", "assistant", "system", "developer")
# What NeMo Gym 0.4 takes as responses_create_params; it refuses a request with any other key.
# fmt: off
_PARAMETERS = frozenset((
    "background", "include", "input", "instructions", "max_output_tokens", "max_tool_calls", "metadata",
    "model", "parallel_tool_calls", "previous_response_id", "prompt", "reasoning", "service_tier", "store",
    "stream", "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user",
))
# fmt: on
# What a resources server's verify request asks of its rows, keyed by the server's folder. "a.b": b in a.
_SERVER_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "reasoning_gym": {
        "question": (str,),
        "answer": (str, type(None)),
        "metadata": (dict,),
        "metadata.source_dataset": (str,),
    },
    "workplace_assistant": {
        "id": (int,),
        "ground_truth": (list, str),
        "category": (str,),
        "environment_name": (str,),
    },
}
_JSON_NAMES = {str: "a string", int: "an integer", list: "an array", dict: "an object", type(None): "null"}

Problem = tuple[str, str]  # field, reason


def server_of(config_path: str) -> str:
    """The resources server's folder in NeMo Gym: what follows `resources_servers/` in its config's path."""
    parts = Path(config_path).parts
    return parts[parts.index("resources_servers") + 1] if "resources_servers" in parts[:-1] else ""


def load_rows(
    path: Path,
    env_name: str,
    agent: str,
    known_agents: Collection[str],
    *,
    server: str = "",
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """The first `limit` rows of a JSONL file, each with an agent_ref.

    known_agents: the agents of all selected environments, `agent` (this one's) among them.
    server: the resources server's folder, for the fields that it asks for. Blank lines are passed over.
    Raises DataError with all problems of the file (20 of them in full), one `path:line: field: reason` each.
    """
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # some editors put that mark first
    except OSError as error:
        raise DataError(f"env.{env_name}.data: {path} cannot be read: {error.strerror}") from None
    with _no_garbage_collection():
        for number, line in enumerate(content.split(b"\n"), start=1):
            if limit is not None and len(rows) >= limit:
                break
            if not line.strip():
                continue
            at = f"{path}:{number}"
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                problems.append(f"{at}: not valid JSON: {error}")
                continue
            if not isinstance(row, dict):
                problems.append(f"{at}: a row must be a JSON object, got {_shown(row)}")
                continue
            row.setdefault("agent_ref", {"type": "responses_api_agents", "name": agent})
            rows.append(row)
            problems.extend(f"{at}: {field}: {why}" for field, why in _problems(row, known_agents, server))
    if problems:
        raise DataError(_message(env_name, problems))
    if not rows:
        raise DataError(f"env.{env_name}.data: {path} must hold at least one row, but it is empty")
    return rows


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Parsing makes millions of objects that all stay; looking for garbage among them takes longer still."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _message(env_name: str, problems: list[str]) -> str:
    shown = problems[:_MOST_PROBLEMS]
    if hidden := len(problems) - len(shown):
        shown.append(f"and {hidden} more")
    return "\n".join(
        [f"env.{env_name}.data: {len(problems)} problem{'s' * (len(problems) > 1)} in its rows", *shown]
    )


def _problems(row: dict[str, Any], known_agents: Collection[str], server: str) -> Iterator[Problem]:
    parameters = row.get("responses_create_params")
    if not isinstance(parameters, dict):
        yield "responses_create_params", _expected("an object", row, "responses_create_params")
    else:
        for key in parameters.keys() - _PARAMETERS:
            yield (
                f"responses_create_params.{key}",
                f"NeMo Gym knows no such key{nearest(key, sorted(_PARAMETERS))}",
            )
        yield from _input_problems(parameters)
        yield from _tool_problems(parameters.get("tools"))
    yield from _agent_problems(row["agent_ref"], known_agents)
    yield from _server_problems(row, server)


def _input_problems(parameters: dict[str, Any]) -> Iterator[Problem]:
    at = "responses_create_params.input"
    items = parameters.get("input")
    if isinstance(items, str):
        if not items:
            yield at, "must not be empty"
        return
    if not isinstance(items, list) or not items:
        yield at, _expected("a non-empty array of messages, or a string", parameters, "input")
        return
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            yield f"{at}[{index}]", f"must be a message object, got {_shown(item)}"
        elif item.get("type", "message") == "message":
            if item.get("role") not in _ROLES:
                yield (
                    f"{at}[{index}].role",
                    f"must be one of {', '.join(_ROLES)}, got {_shown(item.get('role'))}",
                )
            if not isinstance(item.get("content"), str | list):
                yield f"{at}[{index}].content", _expected("a string or an array of parts", item, "content")


def _tool_problems(tools: Any) -> Iterator[Problem]:
    at = "responses_create_params.tools"
    if tools is None:
        return
    if not isinstance(tools, list):
        yield at, f"must be an array, got {_shown(tools)}"
        return
    for index, tool in enumerate(tools):
        here = f"{at}[{index}]"
        if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
            yield here, "must be an object with a type, e.g. {type: function, name: …, parameters: {…}}"
        elif tool["type"] == "function":
            if isinstance(tool.get("function"), dict):
                yield here, "has the Chat Completions shape: name and parameters must stand beside type"
                continue
            if not tool.get("name") or not isinstance(tool["name"], str):
                yield f"{here}.name", _expected("a non-empty string", tool, "name")
            if not isinstance(tool.get("parameters"), dict | None):
                yield f"{here}.parameters", _expected("an object", tool, "parameters")


def _agent_problems(reference: Any, known_agents: Collection[str]) -> Iterator[Problem]:
    if not isinstance(reference, dict) or not isinstance(reference.get("name"), str):
        yield "agent_ref", f"must be {{type: responses_api_agents, name: …}}, got {_shown(reference)}"
    elif reference["name"] not in known_agents:
        known, name = sorted(known_agents), reference["name"]
        yield (
            "agent_ref.name",
            f"{name!r} is no agent of the selected environments{nearest(name, known)} "
            f"(they have: {', '.join(known)})",
        )


def _server_problems(row: dict[str, Any], server: str) -> Iterator[Problem]:
    for field, types in _SERVER_FIELDS.get(server, {}).items():
        holder, _, key = field.rpartition(".")
        within = row.get(holder) if holder else row
        if not isinstance(within, dict):
            continue  # said by the holder's own entry
        if key not in within or isinstance(within[key], bool) or not isinstance(within[key], types):
            expected = " or ".join(_JSON_NAMES[t] for t in types)
            yield field, f"{_expected(expected, within, key)} ({server} asks for it)"
    if server == "workplace_assistant" and isinstance(row.get("ground_truth"), list):
        for index, call in enumerate(row["ground_truth"]):
            if not isinstance(call, dict) or not all(isinstance(value, str) for value in call.values()):
                yield f"ground_truth[{index}]", "must be an object of strings: {name: …, arguments: …}"


def _expected(what: str, holder: dict[str, Any], key: str) -> str:
    return f"must be {what}, {f'got {_shown(holder[key])}' if key in holder else 'but it is missing'}"


def _shown(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}…"
