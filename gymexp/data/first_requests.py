"""What NeMo Gym makes of the rows before a rollout begins: it refuses them, or asks the policy something.

NeMo Gym's own models say it, in its own Python: one process for all rows, whose answers are kept.
"""

from __future__ import annotations

import json
import subprocess
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
from gymexp.gym.install import environ_for, missing_package
from gymexp.gym.plan import model_server
from gymexp.processes.last_words import last_exception

_SCRIPT = Path(__file__).parent.parent / "gym" / "row_check.py"  # not imported: it runs in NeMo Gym's Python
_DEADLINE_S = 1800.0
# What `gym.client.request_body` adds to each row; the values are a run's own and change nothing here.
_ASKED = {"temperature": 1.0, "top_p": 1.0, "max_output_tokens": 1, "metadata": {"extra_body": "{}"}}


@dataclass(frozen=True)
class Split:
    """Rows of one file, with their lines' numbers, as they are to be played."""

    env: str
    name: str  # train or validation
    path: Path
    sha256: str
    rows: Sequence[tuple[int, dict[str, Any]]]

    def key(self, index: int) -> str:
        return f"{self.env}/{self.name}/{index:06d}"


def first_requests(config: RunConfig, splits: Sequence[Split], python: Path, cache: Path, say: Say) -> Path:
    """A file with a line for each row: its task's key, where it stands, and the first chat completion request
    that the policy's endpoint gets of it; `row_check` says more.

    python: NeMo Gym's interpreter. Nulls that NeMo Gym refuses are taken out of the rows. Raises DataError
    with the rows that it refuses.
    """
    server = model_server("http://127.0.0.1:1", config.model.chat_template_kwargs)
    determined_by = {
        "script": sha256_of(_SCRIPT),
        "versions": versions(python, ("nemo-gym", "openai", "pydantic")),
        "model_server": server,
        "asked": _ASKED,
        "splits": [[s.env, s.name, str(s.path), s.sha256, len(s.rows)] for s in splits],
    }

    def make(directory: Path) -> None:
        say("asking NeMo Gym what it makes of the rows")
        rows = (row for split in splits for _, row in split.rows)
        answers = _ask(python, {"model_server": server, "asked": _ASKED}, rows)
        _write(directory, splits, answers)

    entry, _ = cached(cache, "requests", determined_by, make, say)
    without = json.loads((entry / "nulls.json").read_text())
    for split in splits:
        for index, (_, row) in enumerate(split.rows):
            for path in without.get(split.key(index), ()):
                _take_out(row, path)
    return entry / "requests.jsonl"


def _ask(python: Path, about: dict[str, Any], rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    lines = b"".join(orjson.dumps(line) + b"\n" for line in (about, *rows))
    try:
        done = subprocess.run(
            [python, "-P", "-W", "ignore", _SCRIPT],
            input=lines,
            capture_output=True,
            timeout=_DEADLINE_S,
            env=environ_for(python),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"NeMo Gym had not looked at the rows within {_DEADLINE_S:.0f} s") from None
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip()
        said = last_exception(text) or text[-2000:]
        raise DataError(
            f"NeMo Gym's own check of the rows, in {python}, ended with {done.returncode}: {said}"
            + (f"\n{advice}" if (advice := missing_package(said, python)) else "")
        )
    return map(orjson.loads, done.stdout.splitlines())


def _write(directory: Path, splits: Sequence[Split], answers: Iterator[dict[str, Any]]) -> None:
    """Raises DataError if one of the answers is a refusal."""
    problems: dict[str, list[str]] = {}
    without: dict[str, Any] = {}
    with (directory / "requests.jsonl").open("wb") as file:
        for split in splits:
            for index, (number, _) in enumerate(split.rows):
                while "tools" in (answer := next(answers)):
                    file.write(orjson.dumps(answer) + b"\n")
                at, key = f"{split.path}:{number}", split.key(index)
                for field, why in answer.get("problems", ()):
                    problems.setdefault(split.env, []).append(f"{at}: {field}: {why}")
                if taken := answer.get("without"):
                    without[key] = taken
                line = {"key": key, "at": at, "request": answer.get("request")}
                file.write(orjson.dumps(line) + b"\n")
    if problems:
        raise DataError("\n".join(message(env, some) for env, some in problems.items()))
    (directory / "nulls.json").write_bytes(orjson.dumps(without))


def _take_out(row: dict[str, Any], path: list[str | int]) -> None:
    holder: Any = row
    for part in path[:-1]:
        holder = holder[part]
    del holder[path[-1]]
