"""Checks rows with NeMo Gym's request model, and turns them into requests with NeMo Gym's model server. A
script for NeMo Gym's venv; it imports nothing of gymexp.

Line protocol, JSON. First line in: {"model_server": the configuration of NeMo Gym's model server, "asked":
the fields that every request adds to the row's responses_create_params}. Then in: one row per line. Out, one
line for each row: {"problems": [[field, reason], …]} if NeMo Gym refuses it, or else

    {"without": paths of the nulls that NeMo Gym takes only if their keys are left out,
     "request": the first chat completion request of a rollout, as the policy's endpoint gets it}

Rows share their tools, so `request` has the number of its list of tools. A line {"tools": …} of its own
precedes the first request that has this list.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

PROTOCOL = os.dup(1)  # NeMo Gym prints while it is imported: stdout becomes stderr
os.dup2(2, 1)

PARAMETERS = "responses_create_params"
# Request fields of NeMo Gym 0.7 that neither its model server nor gymexp's gateway carries out.
_NOT_CARRIED_OUT = ("context_management", "conversation", "moderation", "prompt_cache_key")
_NOT_CARRIED_OUT += ("prompt_cache_retention", "safety_identifier", "stream_options")
Path = tuple[Any, ...]  # keys and indices into a row
Problem = tuple[str, str]
_NAMES = {
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
}
_NAMES |= {
    "model_attributes_type": "an object",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}
# Costs of errors: of a union's alternatives, the one with the cheapest errors is taken for the intended one.
_WRONG_TYPE, _NO_TEXT, _MISSING, _WRONG_KIND, _OTHER, _DEPTH = 1000.0, 500.0, 150.0, 100.0, 10.0, 0.9


def problems_of(row: dict[str, Any], errors: list[dict[str, Any]]) -> list[Problem]:
    """Returns pydantic's errors as problems; of a union, only those of the intended alternative."""
    _, problems = _best_reading([(_tokens(row, error), error) for error in errors], (), row)
    return problems


def _tokens(row: Any, error: dict[str, Any]) -> list[tuple[bool, Any]]:
    """Returns the parts of the error's location, each with whether it is a key or an index of the row. Any
    other part names an alternative of a union."""
    tokens, value, loc = [], row, error["loc"]
    for number, part in enumerate(loc):
        is_missing = error["type"] == "missing" and number == len(loc) - 1
        is_key = (isinstance(value, dict) and (part in value or is_missing)) or (
            isinstance(value, list) and isinstance(part, int)
        )
        tokens.append((is_key, part))
        if is_key:
            value = None if is_missing else _inner(value, part)
    return tokens


def _best_reading(errors: list[tuple[list, dict]], path: Path, value: Any) -> tuple[float, list[Problem]]:
    """Returns the cost of the value's errors, i.e. its distance from what was intended, and its problems."""
    cost, problems = 0.0, []
    inner: dict[Any, list] = {}
    alternatives: dict[Any, list] = {}
    for tokens, error in errors:
        if not tokens:
            cost += _cost(error, value)
            problems.append((_field(path), _reason(error, value)))
        else:
            (is_key, part), *rest = tokens
            (inner if is_key else alternatives).setdefault(part, []).append((rest, error))
    for key, inner_errors in inner.items():
        is_missing = isinstance(value, dict) and key not in value
        inner_value = None if is_missing else value[key]
        inner_cost, inner_problems = _best_reading(inner_errors, (*path, key), inner_value)
        cost += inner_cost * _DEPTH
        problems += inner_problems
    if alternatives:
        if isinstance(value, dict) and (types := _types(value, alternatives)):
            cost += _OTHER
            problems.append(
                (_field((*path, "type")), f"must be {' or '.join(types)}, got {_shown(value['type'])}")
            )
        elif (
            isinstance(value, dict) and isinstance(value.get("function"), dict) and path[-2:-1] == ("tools",)
        ):
            problems.append(
                (_field(path), "has the Chat Completions shape: name and parameters must stand beside type")
            )
        else:
            readings = {name: _best_reading(errors, path, value) for name, errors in alternatives.items()}
            best = min(readings, key=lambda name: readings[name][0])
            best_cost, best_problems = readings[best]
            tokens, error = alternatives[best][0]
            if not tokens and error["type"] in _NAMES:
                # No alternative has the kind of the value, so the message names all kinds.
                kinds = [
                    _NAMES.get(e["type"]) for errors in alternatives.values() for t, e in errors if not t
                ]
                if names := list(dict.fromkeys(name for name in kinds if name)):
                    best_problems = [(_field(path), f"must be {' or '.join(names)}, got {_shown(value)}")]
            cost += best_cost
            problems += best_problems
    return cost, list(dict.fromkeys(problems))


def _types(value: dict, alternatives: dict[Any, list]) -> list[str]:
    """Returns the allowed values of `type` if no alternative has the value's type, else an empty list."""
    if "type" not in value:
        return []
    expected = []
    for errors in alternatives.values():
        wrong = [e for t, e in errors if t == [(True, "type")] and e["type"] == "literal_error"]
        if not wrong:
            return []
        expected += [e["ctx"]["expected"] for e in wrong]
    return list(dict.fromkeys(expected))


def _cost(error: dict[str, Any], value: Any) -> float:
    kind = error["type"]
    if kind == "string_type" and isinstance(value, dict | list):
        return _NO_TEXT
    if kind == "literal_error" and error["loc"][-1] == "type":
        return _WRONG_TYPE
    return _WRONG_KIND if kind in _NAMES else _MISSING if kind == "missing" else _OTHER


def _reason(error: dict[str, Any], value: Any) -> str:
    kind = error["type"]
    if kind == "missing":
        may_be_null = error["loc"][-1] == "strict" and "tools" in error["loc"]
        return "must be set" + (" (null is allowed)" if may_be_null else "") + ", but it is missing"
    if kind == "extra_forbidden":
        return f"NeMo Gym knows no such key{_nearest(error['loc'])}"
    if kind == "union_tag_not_found":
        return f"must be an object with a type, got {_shown(value)}"
    if kind == "union_tag_invalid":
        return f"has a type that NeMo Gym does not know: {_shown(error['ctx']['tag'])}"
    text = re.sub(r", (unable to|got a) .*", "", error["msg"]).replace("Input should be", "must be")
    rule = f"must be {_NAMES[kind]}" if kind in _NAMES else text.replace("False", "false")
    return f"{rule}, got {_shown(value)}"


def _nearest(loc: Path) -> str:
    from nemo_gym.openai_utils import (  # pyright: ignore[reportMissingImports]
        NeMoGymResponseCreateParamsNonStreaming as Parameters,
    )

    known = sorted(Parameters.model_fields) if len(loc) == 2 else []
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
    return f"; did you mean {PARAMETERS}.{close[0]}?" if close else ""


def _field(path: Path) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def without_nulls(
    row: dict[str, Any], errors_of: Callable[[dict], list[dict]]
) -> tuple[list[Path], list[dict]]:
    """Removes from the row, one after the other, the nulls that NeMo Gym refuses; a missing key means the
    same. Returns the paths of these nulls, and the errors that are left."""
    removed: list[Path] = []
    errors = errors_of(row)
    while path := next(_nulls(row, errors), None):
        _remove(row, path)
        removed.append(path)
        errors = errors_of(row)
    return removed, errors


def _nulls(row: dict[str, Any], errors: list[dict[str, Any]]) -> Iterator[Path]:
    for error in errors:
        path = tuple(part for is_key, part in _tokens(row, error) if is_key)
        holder: Any = row
        for part in path[:-1]:
            holder = _inner(holder, part)
        if isinstance(holder, dict) and path and path[-1] in holder and holder[path[-1]] is None:
            yield path


def _inner(holder: Any, key: Any) -> Any:
    return holder[key]


def _remove(row: Any, path: Path) -> None:
    for part in path[:-1]:
        row = row[part]
    del row[path[-1]]


class Judge:
    """NeMo Gym's request model and its model server, which judge rows as they do in a rollout."""

    def __init__(self, model_server: dict[str, Any], asked: dict[str, Any]) -> None:
        """model_server: the model server's configuration. asked: the fields that every request adds to the
        row's responses_create_params."""
        from nemo_gym.base_resources_server import BaseRunRequest  # pyright: ignore[reportMissingImports]
        from nemo_gym.config_types import BaseServerConfig  # pyright: ignore[reportMissingImports]
        from nemo_gym.server_utils import ServerClient  # pyright: ignore[reportMissingImports]
        from omegaconf import OmegaConf
        from pydantic import ValidationError  # pyright: ignore[reportMissingImports]
        from responses_api_models.vllm_model.app import (  # pyright: ignore[reportMissingImports]
            VLLMModel,
            VLLMModelConfig,
        )

        address = {"host": "127.0.0.1", "port": 0}
        self._run_request, self._error = BaseRunRequest, ValidationError
        self._server = VLLMModel(
            config=VLLMModelConfig.model_validate(model_server | address | {"name": "policy_model"}),
            server_client=ServerClient(
                head_server_config=BaseServerConfig.model_validate(address),
                global_config_dict=OmegaConf.create(),
            ),
        )
        self._added = asked
        self._numbers: dict[str, int] = {}  # of accepted lists of tools, by their JSON in the row
        self._count = 0

    def judge(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the lines of output for one row."""
        number, row = self._without_known_tools(row)
        removed, errors = without_nulls(row, self._errors)
        if errors:
            yield {"problems": problems_of(row, errors)}
            return
        if problems := _left_over(row[PARAMETERS]):
            yield {"problems": problems}
            return
        try:
            request = self._request(row[PARAMETERS])
        except self._error as error:
            first = dict(error.errors(include_url=False)[0])
            if null := _null_in_chat(row, first):
                _remove(row, null)
                for line in self.judge(row):
                    nulls = {"without": [*removed, null, *line["without"]]} if "without" in line else {}
                    yield line | nulls
            else:
                yield {"problems": [_refused_chat(row, first)]}
            return
        except Exception as error:  # on any exception, the model server would answer 500
            why = f"{PARAMETERS}: NeMo Gym's model server can make no request of the row: {error}"
            field, _, reason = (_without_role(row[PARAMETERS]) or why).partition(": ")
            yield {"problems": [(field, reason)]}
            return
        if number is None and request.get("tools"):
            number, self._count = self._count, self._count + 1
            self._numbers[json.dumps(row[PARAMETERS]["tools"])] = number
            yield {"tools": request["tools"]}
        yield {"without": removed, "request": request if number is None else request | {"tools": number}}

    def _without_known_tools(self, row: dict[str, Any]) -> tuple[int | None, dict[str, Any]]:
        """Returns the number of the row's tools and the row without them, if these tools were accepted
        before; else None and the row."""
        parameters = row.get(PARAMETERS)
        if not isinstance(parameters, dict) or not parameters.get("tools"):
            return None, row
        if parameters.get("tool_choice") not in (None, "auto", "none"):
            return None, row  # NeMo Gym 0.7 refuses another choice without tools
        number = self._numbers.get(json.dumps(parameters["tools"]))
        if number is None:
            return None, row
        return number, row | {PARAMETERS: {k: v for k, v in parameters.items() if k != "tools"}}

    def _errors(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        try:
            self._run_request.model_validate(row)
        except self._error as error:
            return list(map(dict, error.errors(include_url=False)))
        return []

    def _request(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Returns the chat completion request that NeMo Gym's model server sends to the policy."""
        metadata = (parameters.get("metadata") or {}) | self._added["metadata"]
        complete = parameters | self._added | {"metadata": metadata}
        checked = self._run_request.model_validate({PARAMETERS: complete}).responses_create_params
        chat = self._server._converter.responses_to_chat_completion_create_params(checked)
        body = chat.model_dump(exclude_unset=True)
        return self._server._preprocess_chat_completion_create_params(None, body)


def _without_role(parameters: dict[str, Any]) -> str:
    """Returns the problem of the first item of the input that has neither a type nor a role, or ""."""
    items = parameters["input"] if isinstance(parameters["input"], list) else []
    for index, item in enumerate(items):
        if not item.get("type") and not item.get("role"):
            return f"{PARAMETERS}.input[{index}].role: must be set, or the item's type must"
    return ""


def _left_over(parameters: dict[str, Any]) -> list[Problem]:
    """Returns a problem for each field of the request that nobody would carry out."""
    rule = "must be left out, as gymexp's gateway has nothing that carries it out, got"
    given = [name for name in _NOT_CARRIED_OUT if parameters.get(name) is not None]
    return [(f"{PARAMETERS}.{name}", f"{rule} {_shown(parameters[name])}") for name in given]


def _null_in_chat(row: dict[str, Any], error: dict[str, Any]) -> Path | None:
    """Returns the path in the row of a null that is an error in the chat completion request; None if the
    error is not a null of the row."""
    path = _path_in_row(error["loc"])
    holder: Any = row
    for part in path[:-1]:
        holder = holder[part] if isinstance(holder, list) or part in holder else {}
    return path if path[-1] in holder and holder[path[-1]] is None else None


def _path_in_row(loc: Path) -> Path:
    """Returns the path in the row of a location in its chat completion request. `messages` is in no row."""
    if loc[0] == "tools":  # a chat completion request has a tool's fields in `function`, a row has not
        return (PARAMETERS, "tools", loc[1], *loc[3:])
    return (PARAMETERS, loc[0])


def _refused_chat(row: dict[str, Any], error: dict[str, Any]) -> Problem:
    """Returns the problem of a row that the request model accepts, but that NeMo Gym's model server cannot
    turn into a chat completion request."""
    path = _path_in_row(error["loc"])
    if path[1] == "tools" and (kind := row[PARAMETERS]["tools"][path[2]].get("type")) != "function":
        rule = "must be a function, as NeMo Gym's model server offers the policy no others"
        return _field((*path[:3], "type")), f"{rule}, got {_shown(kind)}"
    if path[1] in row[PARAMETERS]:
        return _field(path), _reason(error, error["input"])
    at = ".".join(str(part) for part in error["loc"])
    return PARAMETERS, f"NeMo Gym's model server can make no request of the row: {at}: {error['msg']}"


def main() -> None:
    judge = Judge(**json.loads(sys.stdin.buffer.readline()))
    with os.fdopen(PROTOCOL, "w") as out:
        for line in sys.stdin.buffer:
            for result in judge.judge(json.loads(line)):
                out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
