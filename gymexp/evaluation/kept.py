"""The outcomes of an evaluation while it plays: on disk soon after they land, so that a kill loses few.

`landing/<name>.jsonl.zst` grows by a zstd frame each time, which is synced. An outcome a line, with the
number of its sample of the task. At the end the outcomes go to `rollouts/<name>.jsonl.zst`, in the order of
the plan, and the file is removed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import zstandard

from gymexp.files import at
from gymexp.rollout.outcome import Failed, Outcome, Task, outcome_from_json, outcome_to_json, task_of
from gymexp.rollout.rollout_files import read_index, read_outcomes

Place = tuple[str, int]  # a task's key, and the number of its sample


class KeptOutcomes:
    """The outcomes of one policy that have landed, also in an earlier start of the evaluation."""

    def __init__(self, directory: Path, name: str, tasks: Mapping[str, Task]) -> None:
        """directory: the evaluation's. name: of the policy's file. tasks: the evaluation's, by key."""
        self._tasks = tasks
        self._path = directory / "landing" / f"{name}.jsonl.zst"
        self.by_place: dict[Place, Outcome] = {}
        if (done := directory / "rollouts" / f"{name}.jsonl.zst").exists():
            numbers: dict[str, int] = {}
            for record in read_outcomes(done):
                key = _key_of(record)
                numbers[key] = numbers.get(key, -1) + 1
                self._take(record, numbers[key])
        records, whole = read_landed(self._path)
        for record in records:
            self._take(record, record.pop("sample"))
        if self._path.exists() and whole < self._path.stat().st_size:
            os.truncate(self._path, whole)  # a frame that was not written whole

    def missing(self, places: Sequence[Place]) -> list[Place]:
        """Returns the places without a scored outcome, in order."""
        return [place for place in places if isinstance(self.by_place.get(place), Failed | None)]

    def add(self, landed: Sequence[tuple[Place, Outcome]]) -> None:
        """Appends outcomes to the file, and returns once they are on the disk."""
        lines = []
        for (key, sample), outcome in landed:
            assert task_of(outcome).key == key
            lines.append(orjson.dumps(outcome_to_json(outcome) | {"sample": sample}) + b"\n")
            self.by_place[key, sample] = outcome
        self._path.parent.mkdir(exist_ok=True)
        with at(self._path), self._path.open("ab") as file:
            file.write(zstandard.compress(b"".join(lines)))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Removes the file, once the outcomes are in `rollouts/`."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another policy's file is there
            self._path.parent.rmdir()

    def _take(self, record: dict[str, Any], sample: int) -> None:
        """Notes an outcome of the file, unless its task is no longer of the evaluation. A failure takes the
        place of no score."""
        if (task := self._tasks.get(key := _key_of(record))) is None:
            return
        outcome = outcome_from_json(record, task)
        if not isinstance(outcome, Failed) or (key, sample) not in self.by_place:
            self.by_place[key, sample] = outcome


def num_scored(directory: Path) -> int:
    """Returns how many rollouts of an evaluation have a reward, landed or written. directory: the
    evaluation's."""
    scored = sum(row.get("reward") is not None for row in read_index(directory / "rollouts"))
    for path in (directory / "landing").glob("*.jsonl.zst"):
        scored += sum(record["outcome"] != "failed" for record in read_landed(path)[0])
    return scored


def read_landed(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the records of a file in `landing/`, and the number of bytes in its whole frames."""
    rest = data = path.read_bytes() if path.exists() else b""
    records: list[dict[str, Any]] = []
    while rest:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            lines = frame.decompress(rest)
        except zstandard.ZstdError:
            break
        if not frame.eof:
            break
        records += map(orjson.loads, lines.splitlines())
        rest = frame.unused_data
    return records, len(data) - len(rest)


def _key_of(record: Mapping[str, Any]) -> str:
    return (record.get("rollout") or record)["task"]["key"]
