"""Finds the dataset row of a task in a run's `data/` without parsing the others."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from gymexp.errors import RunDirectoryError
from gymexp.record.own_files import parsed
from gymexp.view.run_files import RunFiles

_NAMES = ("data/train.jsonl", "data/validation.jsonl")
_MAX_ROW = 16 << 20  # bytes
_KEY = re.compile(rb'\{"key":\s*"([^"\\]+)"')


class TaskRows:
    """The places of a run's dataset rows, read on first use."""

    def __init__(self, files: RunFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._places: dict[str, tuple[str, int, int]] | None = None

    def read(self, key: str) -> Mapping[str, Any] | None:
        """Returns the dataset row of a task; None if the run directory does not have it."""
        line = self._line(key)
        task = parsed(line) if line else None
        row = task.get("row") if isinstance(task, dict) and task.get("key") == key else None
        return row if isinstance(row, dict) else None

    def digest(self, key: str) -> bytes | None:
        """Returns a hash of a task's row; None if the run directory does not have it."""
        line = self._line(key)
        return hashlib.blake2b(line.strip()).digest() if line else None

    def _line(self, key: str) -> bytes | None:
        with self._lock:
            if self._places is None or (key not in self._places and not self._places):
                self._places = {}
                for name in reversed(_NAMES):
                    for found, offset, length in _scan(self._files, name):
                        self._places.setdefault(found, (name, offset, length))
        if key not in self._places:
            return None
        name, offset, length = self._places[key]
        file = self._files.open(name)
        if file is None or length > _MAX_ROW:
            return None
        with file:
            file.seek(offset)
            return file.read(length)


def _scan(files: RunFiles, name: str) -> Iterator[tuple[str, int, int]]:
    """Yields (key, offset, length) of each line of a file of tasks."""
    try:
        file = files.open(name)
    except RunDirectoryError:
        return
    if file is None:
        return
    offset = 0
    with file:
        while line := file.readline(_MAX_ROW):
            if match := _KEY.match(line):
                yield match[1].decode("utf-8", errors="replace"), offset, len(line)
            offset += len(line)
