"""Dataset rows, read and checked before anything starts, each problem with its line.

What is checked here is not in NeMo Gym's own request model, which `first_requests` asks.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from gymexp.errors import DataError

_MOST_PROBLEMS = 20
_AGENTS = "responses_api_agents"
_LONG_NUMBER = re.compile(rb"\d{19}")
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
    path: Path, env_name: str, agent: str, *, server: str = "", limit: int | None = None
) -> list[dict[str, Any]]:
    """The rows of `read_rows`."""
    return [row for _, row in read_rows(path, env_name, agent, server=server, limit=limit)]


def read_rows(
    path: Path, env_name: str, agent: str, *, server: str = "", limit: int | None = None
) -> list[tuple[int, dict[str, Any]]]:
    """The first `limit` rows of a JSONL file, each with its line's number and an agent_ref.

    agent: the environment's, which plays its rows. server: the resources server's folder, for the fields that
    it asks for. Blank lines are passed over. Raises DataError with all problems of the file (20 of them in
    full), one `path:line: field: reason` each.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
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
                problems.append(f"{at}: a row must be a JSON object, got {shown(row)}")
                continue
            if row.get("agent_ref") is None:
                row["agent_ref"] = {"type": _AGENTS, "name": agent}
            rows.append((number, row))
            problems.extend(f"{at}: {field}: {why}" for field, why in _problems(row, env_name, agent, server))
            if _LONG_NUMBER.search(line):
                problems.extend(f"{at}: {field}: {why}" for field, why in _long_integers(json.loads(line)))
    if problems:
        raise DataError(message(env_name, problems))
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


def message(env_name: str, problems: list[str]) -> str:
    """All that is wrong with an environment's rows, 20 of them in full."""
    listed = problems[:_MOST_PROBLEMS]
    if hidden := len(problems) - len(listed):
        listed.append(f"and {hidden} more")
    return "\n".join(
        [f"env.{env_name}.data: {len(problems)} problem{'s' * (len(problems) > 1)} in its rows", *listed]
    )


def _problems(row: dict[str, Any], env_name: str, agent: str, server: str) -> Iterator[Problem]:
    parameters = row.get("responses_create_params")
    if not isinstance(parameters, dict):
        yield "responses_create_params", _expected("an object", row, "responses_create_params")
    else:
        if not parameters.get("input"):  # NeMo Gym takes an empty one, but the policy would be asked nothing
            what = "a non-empty array of messages, or a string"
            yield "responses_create_params.input", _expected(what, parameters, "input")
        metadata = parameters.get("metadata")
        if isinstance(metadata, dict) and metadata.get("extra_body") is not None:
            yield (
                "responses_create_params.metadata.extra_body",
                "must be left out: gymexp gives each rollout its seed there, and how to sample is said by "
                f"trainer.temperature and evaluation.*, got {shown(metadata['extra_body'])}",
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
    """Integers that orjson, which reads rows here and writes them in NeMo Gym, makes floats of or refuses."""
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
            continue  # said by the holder's own entry
        if key not in within or isinstance(within[key], bool) or not isinstance(within[key], types):
            expected = " or ".join(_JSON_NAMES[t] for t in types)
            yield field, f"{_expected(expected, within, key)} ({server} asks for it)"
    if server == "workplace_assistant" and isinstance(row.get("ground_truth"), list):
        for index, call in enumerate(row["ground_truth"]):
            if not isinstance(call, dict) or not all(isinstance(value, str) for value in call.values()):
                yield f"ground_truth[{index}]", "must be an object of strings: {name: …, arguments: …}"


def _expected(what: str, holder: dict[str, Any], key: str) -> str:
    return f"must be {what}, {f'got {shown(holder[key])}' if key in holder else 'but it is missing'}"


def shown(value: Any) -> str:
    """A value as JSON, cut to 60 characters."""
    text = orjson.dumps(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}…"
