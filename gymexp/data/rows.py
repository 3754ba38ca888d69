"""Reads dataset rows and checks them before anything starts; each problem is reported with its line.

`first_requests` runs NeMo Gym's own request model; this module checks what that model does not.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from gymexp.errors import DataError

_MOST_PROBLEMS = 20
_AGENTS = "responses_api_agents"
_LONG_NUMBER = re.compile(rb"\d{19}")
# The fields that the verify request of a resources server requires, by the server's folder. "a.b": b in a.
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
    """Returns the folder that follows `resources_servers/` in the path of an environment's NeMo Gym file, or
    "" if the path has no such folder."""
    parts = Path(config_path).parts
    return parts[parts.index("resources_servers") + 1] if "resources_servers" in parts[:-1] else ""


def load_rows(
    path: Path, env_name: str, agent: str, *, server: str = "", limit: int | None = None
) -> list[dict[str, Any]]:
    """Returns the rows of `read_rows` without their line numbers."""
    return [row for _, row in read_rows(path, env_name, agent, server=server, limit=limit)]


def read_rows(
    path: Path,
    env_name: str,
    agent: str,
    *,
    server: str = "",
    limit: int | None = None,
    of_nemo_gym: bool = False,
    may_be_empty: Callable[[], bool] = lambda: False,
) -> list[tuple[int, dict[str, Any]]]:
    """Returns the first `limit` rows of a JSONL file, each with its line number and an agent_ref.

    agent: the environment's agent, which must play all its rows. server: the folder of the resources server
    whose required fields are checked. of_nemo_gym: the rows are NeMo Gym's own, which may name the agent of
    another environment of the same server. may_be_empty: returns whether the agent takes the first prompt
    from its environment, so that a row's input may be an empty array; called if one is. Blank lines are
    skipped. Raises DataError with all problems of the file (20 of them in full), one `path:line: field:
    reason` each.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    problems: list[str] = []
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some editors
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
                problems.append(f"{at}: a row must be a JSON object, got {shown(row)}")
                continue
            if of_nemo_gym or row.get("agent_ref") is None:
                row["agent_ref"] = {"type": _AGENTS, "name": agent}
            rows.append((number, row))
            problems.extend(
                f"{at}: {field}: {why}"
                for field, why in _problems(row, env_name, agent, server, may_be_empty)
            )
            if _LONG_NUMBER.search(line):
                problems.extend(f"{at}: {field}: {why}" for field, why in _long_integers(json.loads(line)))
    if problems:
        raise DataError(message(env_name, problems))
    if not rows:
        raise DataError(f"env.{env_name}.data: {path} must hold at least one row, but it is empty")
    return rows


def with_system(row: dict[str, Any], text: str) -> list[Any]:
    """Returns a row's messages with `text` as the system message, in place of those that they begin with."""
    messages = row["responses_create_params"]["input"]
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    is_system = lambda m: isinstance(m, dict) and m.get("role") in ("system", "developer")  # noqa: E731
    return [{"role": "system", "content": text}, *itertools.dropwhile(is_system, messages)]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turns garbage collection off in the block. Parsing makes millions of objects, none of them garbage, and
    to search them takes longer than to make them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def message(env_name: str, problems: list[str]) -> str:
    """Returns the error message for the problems of an environment's rows; it lists the first 20."""
    listed = problems[:_MOST_PROBLEMS]
    if hidden := len(problems) - len(listed):
        listed.append(f"and {hidden} more")
    return "\n".join(
        [f"env.{env_name}.data: {len(problems)} problem{'s' * (len(problems) > 1)} in its rows", *listed]
    )


def _problems(
    row: dict[str, Any], env_name: str, agent: str, server: str, may_be_empty: Callable[[], bool]
) -> Iterator[Problem]:
    parameters = row.get("responses_create_params")
    if not isinstance(parameters, dict):
        yield "responses_create_params", _expected("an object", row, "responses_create_params")
    else:
        given = parameters.get("input")
        if not given and not (given == [] and may_be_empty()):  # NeMo Gym would take it, with an empty prompt
            rule = "a non-empty array of messages, or a string"
            yield "responses_create_params.input", _expected(rule, parameters, "input")
        metadata = parameters.get("metadata")
        if isinstance(metadata, dict) and metadata.get("extra_body") is not None:
            yield (
                "responses_create_params.metadata.extra_body",
                "must be left out: gymexp passes each rollout's seed in it, and trainer.temperature and "
                f"evaluation.* decide the sampling, got {shown(metadata['extra_body'])}",
            )
    yield from _agent_problems(row["agent_ref"], env_name, agent)
    yield from _server_problems(row, server)


def _agent_problems(reference: Any, env_name: str, agent: str) -> Iterator[Problem]:
    if not isinstance(reference, dict) or not isinstance(reference.get("name"), str):
        yield "agent_ref", f"must be {{type: {_AGENTS}, name: …}}, got {shown(reference)}"
        return
    if reference.get("type", _AGENTS) != _AGENTS:
        yield "agent_ref.type", f"must be {_AGENTS}, got {shown(reference['type'])}"
    if reference["name"] != agent:
        yield (
            "agent_ref.name",
            f"must be {agent} (env.{env_name}.agent), which plays all its rows, got "
            f"{shown(reference['name'])}: give the row to that agent's environment, or leave agent_ref out",
        )


def _long_integers(value: Any, field: str = "") -> Iterator[Problem]:
    """Yields a problem for each integer beyond 64 bits. orjson, which gymexp reads and NeMo Gym writes rows
    with, refuses such an integer or turns it into a float."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _long_integers(inner, f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _long_integers(inner, f"{field}[{index}]")
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        yield (
            field,
            f"must be an integer of 64 bits, as NeMo Gym passes on no longer ones, got {value}: quote it",
        )


def _server_problems(row: dict[str, Any], server: str) -> Iterator[Problem]:
    for field, types in _SERVER_FIELDS.get(server, {}).items():
        holder, _, key = field.rpartition(".")
        within = row.get(holder) if holder else row
        if not isinstance(within, dict):
            continue  # the holder's own entry in _SERVER_FIELDS reports it
        if key not in within or isinstance(within[key], bool) or not isinstance(within[key], types):
            expected = " or ".join(_JSON_NAMES[t] for t in types)
            yield field, f"{_expected(expected, within, key)} ({server} requires it)"
    if server == "workplace_assistant" and isinstance(row.get("ground_truth"), list):
        for index, call in enumerate(row["ground_truth"]):
            if not isinstance(call, dict) or not all(isinstance(value, str) for value in call.values()):
                yield f"ground_truth[{index}]", "must be an object of strings: {name: …, arguments: …}"


def _expected(rule: str, holder: dict[str, Any], key: str) -> str:
    return f"must be {rule}, {f'got {shown(holder[key])}' if key in holder else 'but it is missing'}"


def shown(value: Any) -> str:
    """Returns a value as JSON, cut to 60 characters."""
    text = orjson.dumps(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}…"
