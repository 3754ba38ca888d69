"""Reads the files of a run directory that a stranger may have made: within bounds, and never outside of it.

A file is opened only if its real path, with every symbolic link followed, is inside the run directory, or in
a folder of the run behind a link, and is a plain file. What is read, decompressed and parsed has an upper
limit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gymexp.config.plain_yaml import load_plain_yaml
from gymexp.errors import RunDirectoryError
from gymexp.record.linked_folders import is_own_link
from gymexp.record.own_files import MAX_FRAME, decompressed, open_own, parsed

_MAX_SMALL = 4 << 20  # bytes of config.yaml and the like


class RunFiles:
    """The files of one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def open(self, name: str) -> BinaryIO | None:
        """Opens a file by its path below the run directory; None if there is none. Raises RunDirectoryError
        if it is no plain file of this directory."""
        return open_own(self.path, self.path / name)

    def read(self, name: str, limit: int = _MAX_SMALL) -> bytes | None:
        """Returns the content of a small file; None if there is none. Raises RunDirectoryError above `limit`
        bytes."""
        file = self.open(name)
        if file is None:
            return None
        with file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise RunDirectoryError(f"{self.path / name} must have at most {limit >> 20} MB to be shown")
        return content

    def read_text(self, name: str, limit: int = _MAX_SMALL) -> str | None:
        """Returns the text of a small file; None if there is none."""
        content = self.read(name, limit)
        return None if content is None else content.decode("utf-8", errors="replace")

    def read_json(self, name: str) -> dict[str, Any]:
        """Returns the object in a small JSON file; {} if it is missing or damaged."""
        value = parsed(self.read(name) or b"")
        return value if isinstance(value, dict) else {}

    def read_config(self) -> dict[str, Any]:
        """Returns config.yaml; {} if it is missing or is no mapping of plain values."""
        try:
            value = load_plain_yaml(self.read_text("config.yaml") or "")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def tail(self, name: str, size: int) -> tuple[str, int]:
        """Returns the last `size` bytes of a file as text, from a line's beginning, and the size of all."""
        file = self.open(name)
        if file is None:
            return "", 0
        with file:
            whole = file.seek(0, os.SEEK_END)
            file.seek(max(0, whole - size))
            text = file.read(size).decode("utf-8", errors="replace")
        return (text.partition("\n")[2] if whole > size else text), whole

    def names(self, folder: str, suffix: str) -> list[str]:
        """Returns the names in a folder of the run directory that end with `suffix`, sorted; none if the
        folder is not of this run."""
        return sorted(entry.name for entry in self._entries(folder) if entry.name.endswith(suffix))

    def folders(self, folder: str) -> list[str]:
        """Returns the names of the plain folders in a folder of the run directory, sorted."""
        return sorted(entry.name for entry in self._entries(folder) if entry.is_dir(follow_symlinks=False))

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        path = self.path / folder
        if not path.is_dir() or (path.is_symlink() and not is_own_link(self.path, path)):
            return []
        return list(os.scandir(path))

    def read_frame(self, name: str, offset: int, length: int) -> list[bytes]:
        """Returns the lines of a zstd frame of a file. Raises RunDirectoryError if it is not there, damaged,
        or too large."""
        file = self.open(name)
        if file is None:
            raise RunDirectoryError(
                f"{self.path / name} is not there: it was deleted, or is written just now"
            )
        with file:
            if length > min(MAX_FRAME, os.fstat(file.fileno()).st_size):
                raise RunDirectoryError(f"{self.path / name} must have the rollouts that its index lists")
            file.seek(offset)
            content = file.read(length)
        return decompressed(content, self.path / name).splitlines()

    def read_record(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the outcome that a line of the index is about. Raises RunDirectoryError if it is gone."""
        name = f"rollouts/{row['file']}.jsonl.zst"
        lines = self.read_frame(name, row["offset"], row["length"])
        record = parsed(lines[row["line"]]) if row["line"] < len(lines) else None
        if not isinstance(record, dict) or key_of(record) != row["key"]:
            raise RunDirectoryError(
                f"{self.path / name} must have rollout {row['number']}, but was written again meanwhile: "
                "load the page again"
            )
        return record


def key_of(record: Mapping[str, Any]) -> Any:
    """Returns the task's key of an outcome in its JSON form; None if it has none."""
    inner = record.get("rollout") or record
    task = inner.get("task") if isinstance(inner, dict) else None
    return task.get("key") if isinstance(task, dict) else None
