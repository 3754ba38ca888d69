"""NeMo Gym's check of the rows before a run: it refuses a row, or makes the policy's first request of it.

NeMo Gym's own models do this, in NeMo Gym's Python. One process checks all rows; its results are cached.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from gymexp.config.schema import RunConfig
from gymexp.data.cache import Say, cached, sha256_of
from gymexp.data.generate import versions
from gymexp.data.rows import message
from gymexp.errors import DataError
from gymexp.gym.install import run_script
from gymexp.gym.server_plan import model_server

_SCRIPT = Path(__file__).parent.parent / "gym" / "row_check.py"  # not imported: it runs in NeMo Gym's Python
_DEADLINE_S = 1800.0
# The fields that `rollout.play.request_body` adds to each row. Their values do not affect the check.
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_output_tokens": 1, "metadata": {"extra_body": "{}"}}


@dataclass(frozen=True)
class Split:
    """The rows of one file that are to be played, each with its line number."""

    env: str
    name: str  # train or validation
    path: Path
    sha256: str
    rows: Sequence[tuple[int, dict[str, Any]]]

    def key(self, index: int) -> str:
        """Returns the key of the task that is made of row `index`."""
        return f"{self.env}/{self.name}/{index:06d}"


def first_requests(config: RunConfig, splits: Sequence[Split], python: Path, cache: Path, say: Say) -> Path:
    """Returns a JSONL file with a line for each row: its task's key, its place ("file:line"), and the first
    chat completion request that the policy's endpoint gets. Tools are numbered as in `gym/row_check.py`.

    python: NeMo Gym's interpreter. The nulls that NeMo Gym refuses are removed from the rows of `splits`.
    Raises DataError that lists the rows that NeMo Gym refuses.
    """
    server = model_server("http://127.0.0.1:1", config.model.chat_template_kwargs)
    determined_by = {
        "script": sha256_of(_SCRIPT),
        "versions": versions(python, ("nemo-gym", "openai", "pydantic")),
        "model_server": server,
        "asked": _SAMPLING,
        "splits": [[s.env, s.name, str(s.path), s.sha256, len(s.rows)] for s in splits],
    }

    def make(directory: Path) -> None:
        say("checking the rows with NeMo Gym's own models")
        rows = (row for split in splits for _, row in split.rows)
        results = _check_rows(python, {"model_server": server, "asked": _SAMPLING}, rows)
        _write(directory, splits, results)

    entry, _ = cached(cache, "requests", determined_by, make, say)
    nulls_by_key = json.loads((entry / "nulls.json").read_text())
    for split in splits:
        for index, (_, row) in enumerate(split.rows):
            for path in nulls_by_key.get(split.key(index), ()):
                _remove(row, path)
    return entry / "requests.jsonl"


def _check_rows(
    python: Path, header: dict[str, Any], rows: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Returns the lines that `gym/row_check.py` prints for the rows. header: its first line of input."""
    lines = b"".join(orjson.dumps(line) + b"\n" for line in (header, *rows))
    said = run_script(python, [_SCRIPT], "NeMo Gym's own check of the rows", DataError, _DEADLINE_S, lines)
    return map(orjson.loads, said.splitlines())


def _write(directory: Path, splits: Sequence[Split], results: Iterator[dict[str, Any]]) -> None:
    """Writes requests.jsonl and nulls.json. Raises DataError if NeMo Gym refuses a row."""
    problems: dict[str, list[str]] = {}
    nulls_by_key: dict[str, Any] = {}
    with (directory / "requests.jsonl").open("wb") as file:
        for split in splits:
            for index, (number, _) in enumerate(split.rows):
                while "tools" in (result := next(results)):
                    file.write(orjson.dumps(result) + b"\n")
                at, key = f"{split.path}:{number}", split.key(index)
                for field, why in result.get("problems", ()):
                    problems.setdefault(split.env, []).append(f"{at}: {field}: {why}")
                if nulls := result.get("without"):
                    nulls_by_key[key] = nulls
                line = {"key": key, "at": at, "request": result.get("request")}
                file.write(orjson.dumps(line) + b"\n")
    if problems:
        raise DataError("\n".join(message(env, listed) for env, listed in problems.items()))
    (directory / "nulls.json").write_bytes(orjson.dumps(nulls_by_key))


def _remove(row: dict[str, Any], path: list[str | int]) -> None:
    holder: Any = row
    for part in path[:-1]:
        holder = holder[part]
    del holder[path[-1]]
