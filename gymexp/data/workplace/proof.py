"""Proves a drafted task with the workplace server's own code: calls the server's tools and runs its verifier.

Runs inside NeMo Gym's venv. A draft is proven if
* the ground truth scores True against itself, and no calls score False (so the task changes something),
* the expert's calls, look-ups included, score True, and each call of the ground truth succeeds,
* each ID and each address that the expert uses is in the request or in the output of an earlier call,
* no output is longer than LONGEST_OUTPUT characters,
* the calls and the final message fit the agent's turn limit.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas  # pyright: ignore[reportMissingImports]
from resources_servers.workplace_assistant import utils  # pyright: ignore[reportMissingImports]

from gymexp.data.workplace.tasks.draft import Call, Draft

CSV_DATA = Path(utils.__file__).parent / "csv_data"
TOOLKITS = ["email", "calendar", "analytics", "project_management", "customer_relationship_manager"]
MAX_TURNS = 6
LONGEST_OUTPUT = 1600
SUCCESS = re.compile(r"\d{8}|plots/.*\.png|.* successfully\.")
REFERENCE = re.compile(r"\b\d{8}\b|[\w.]+@[\w.]+\w")


@dataclass(frozen=True)
class Proof:
    """The result of `prove`. outputs: the live server's answer to each call. fault: why the draft fails, or
    None. self_reward, idle_reward: the score of the ground truth, and of no calls at all."""

    draft: Draft
    outputs: list[str]
    fault: str | None
    self_reward: bool
    idle_reward: bool


def remember_tables() -> None:
    """Makes pandas read each CSV file only once: one verdict builds twelve tool objects, and each of them
    reads its file anew."""
    read_csv: Callable[..., Any] = pandas.read_csv

    @functools.cache
    def read_once(path: str, options: str) -> Any:
        return read_csv(path, **recent[options])

    recent: dict[str, dict[str, Any]] = {}

    def read(path: Any, **options: Any) -> Any:
        recent[repr(options)] = options
        return read_once(str(path), repr(options)).copy()

    pandas.read_csv = read


def tool_schemas() -> list[dict[str, Any]]:
    """Returns the schemas of the server's 27 tools, in the server's order."""
    return utils.get_tools(TOOLKITS)["schemas"]


def as_actions(calls: list[Call]) -> list[dict[str, str]]:
    """Returns the calls in the format of a row's `ground_truth`, with the arguments as JSON text."""
    return [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in calls]


def score(predicted: list[Call], ground_truth: list[Call]) -> bool:
    """Returns the server's verdict."""
    # The verifier prints the errors of calls that fail.
    with contextlib.redirect_stdout(io.StringIO()):
        return bool(utils.is_correct(as_actions(predicted), as_actions(ground_truth), None))


def live_body(output: Any) -> str:
    """Returns the body of the live server's answer to a tool call: compact JSON, null for an empty cell."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({"output": plain(output)}, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def replay(calls: list[Call]) -> list[Any]:
    """Makes the calls one after the other in a new session, and returns the results of the server's tools."""
    functions = utils.get_tools(TOOLKITS)["functions"]
    return [functions[name](**arguments) for name, arguments in calls]


def find_fault(draft: Draft, results: list[Any], outputs: list[str]) -> str | None:
    """Returns why a policy that has only the request could not make these calls; None if it could.

    results: what the tools return. outputs: the same as the live server's answers.
    """
    if len(draft.calls) + 1 > MAX_TURNS:
        return f"{len(draft.calls)} calls and a message do not fit {MAX_TURNS} turns"
    known = draft.user
    for call, result, output in zip(draft.calls, results, outputs, strict=True):
        name, arguments = call
        unknown = [ref for ref in REFERENCE.findall(json.dumps(arguments)) if ref not in known]
        if unknown:
            return f"{name} uses {unknown}, which are neither in the request nor in an earlier output"
        if call in draft.ground_truth and not SUCCESS.fullmatch(str(result)):
            return f"{name} was refused: {result}"
        if len(output) > LONGEST_OUTPUT:
            return f"{name} returns {len(output)} characters"
        known += output
    return None


def prove(draft: Draft) -> Proof:
    """Makes a draft's calls with the server's own tools, and scores them with the server's verifier."""
    results = replay(draft.calls)
    outputs = [live_body(result) for result in results]
    truth = draft.ground_truth
    self_reward, idle_reward = score(truth, truth), score([], truth)
    fault = find_fault(draft, results, outputs)
    if not self_reward:
        fault = "the ground truth does not score"
    elif idle_reward:
        fault = "doing nothing scores"
    elif len(truth) < len(draft.calls) and not score(draft.calls, truth):
        fault = "the expert's calls do not score"
    return Proof(draft, outputs, fault, self_reward, idle_reward)
