"""Proof of a drafted task by the workplace server's own code: its tools are called and its verifier judges.

Runs inside NeMo Gym's venv. A draft is proven when
* the ground truth scores True against itself and doing nothing scores False (so it changes something),
* the expert's calls, look-ups included, score True, and each of them succeeds,
* each id and address that the expert uses was in the request or in what an earlier call returned,
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
    """What the server answers each call, in the live server's words, and why the draft fails, if it does."""

    draft: Draft
    outputs: list[str]
    fault: str | None
    self_reward: bool
    idle_reward: bool


def remember_tables() -> None:
    """Read each CSV file once: one verdict builds twelve tool objects, each of which reads its own."""
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
    """The 27 tools in the server's order."""
    return utils.get_tools(TOOLKITS)["schemas"]


def as_actions(calls: list[Call]) -> list[dict[str, str]]:
    """Calls as a row's `ground_truth` has them: arguments are JSON text."""
    return [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in calls]


def score(predicted: list[Call], ground_truth: list[Call]) -> bool:
    """The server's verdict; it prints the errors of calls that fail."""
    with contextlib.redirect_stdout(io.StringIO()):
        return bool(utils.is_correct(as_actions(predicted), as_actions(ground_truth), None))


def live_body(output: Any) -> str:
    """The body that the live server answers a tool call with: compact JSON, null for an empty table cell."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({"output": plain(output)}, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def replay(calls: list[Call]) -> list[Any]:
    """What the server's tools return to the calls, one after the other, in a fresh session."""
    functions = utils.get_tools(TOOLKITS)["functions"]
    return [functions[name](**arguments) for name, arguments in calls]


def find_fault(draft: Draft, results: list[Any], outputs: list[str]) -> str | None:
    """Why the trajectory is not one that could be followed from the request alone."""
    if len(draft.calls) + 1 > MAX_TURNS:
        return f"{len(draft.calls)} calls and a message do not fit {MAX_TURNS} turns"
    known = draft.user
    for call, result, output in zip(draft.calls, results, outputs, strict=True):
        name, arguments = call
        unknown = [ref for ref in REFERENCE.findall(json.dumps(arguments)) if ref not in known]
        if unknown:
            return f"{name} uses {unknown}, which nothing said before"
        if call in draft.ground_truth and not SUCCESS.fullmatch(str(result)):
            return f"{name} was refused: {result}"
        if len(output) > LONGEST_OUTPUT:
            return f"{name} returns {len(output)} characters"
        known += output
    return None


def prove(draft: Draft) -> Proof:
    """Play a task's calls on the server's own tools, and have the server's verifier score them."""
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
