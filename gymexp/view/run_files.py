"""Reads the files of a run directory that a stranger may have made: within bounds, and never outside of it.

A file is opened only if its real path, with every symbolic link followed, is inside the run directory and is
a plain file. What is read, decompressed and parsed has an upper limit.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import yaml
import zstandard

from gymexp.errors import RunDirectoryError

MAX_FRAME = 256 << 20  # bytes of a frame after decompression
MAX_LINE = 1 << 20  # bytes of a line of an index
_MAX_SMALL = 4 << 20  # bytes of config.yaml and the like
_MAX_DEPTH = 60  # of a JSON value, in lists and objects
_FILE = re.compile(r"(step|eval)-\d{6,12}")


class RunFiles:
    """The files of one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def open(self, name: str) -> BinaryIO | None:
        """Opens a file by its path below the run directory; None if there is none. Raises RunDirectoryError
        if it is no plain file of this directory."""
        path = self.path / name
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return None
        if not real.is_relative_to(self.path):
            raise RunDirectoryError(
                f"{path} must be a file of the run directory, but is a link that leads out of it: "
                "replace the link by the file"
            )
        try:
            # Without O_NONBLOCK the open of a named pipe would wait for its writer.
            descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise RunDirectoryError(f"{path} must be a plain file")
        return os.fdopen(descriptor, "rb")

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
            value = yaml.load(self.read_text("config.yaml") or "", Loader=_PlainLoader)
        except (yaml.YAMLError, RecursionError, ValueError):
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
        folder is no plain one."""
        path = self.path / folder
        if not path.is_dir() or path.is_symlink():
            return []
        return sorted(entry.name for entry in os.scandir(path) if entry.name.endswith(suffix))

    def folders(self, folder: str) -> list[str]:
        """Returns the names of the plain folders in a folder of the run directory, sorted."""
        path = self.path / folder
        if not path.is_dir() or path.is_symlink():
            return []
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))

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


def is_rollout_file(name: Any) -> bool:
    """Returns whether a name in an index is one that gymexp gives to a file of rollouts."""
    return isinstance(name, str) and bool(_FILE.fullmatch(name))


def decompressed(content: bytes, path: Path) -> bytes:
    """Returns zstd frames decompressed. Raises RunDirectoryError if they are damaged, or hold too much."""
    parts: list[bytes] = []
    size = 0
    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        reader = decompressor.stream_reader(content, read_across_frames=True)
        while part := reader.read(1 << 20):
            size += len(part)
            if size > MAX_FRAME:
                raise RunDirectoryError(
                    f"{path} must have at most {MAX_FRAME >> 20} MB of rollouts in a frame to be shown"
                )
            parts.append(part)
    except zstandard.ZstdError:
        raise RunDirectoryError(f"{path} is damaged, or is written just now: load the page again") from None
    return b"".join(parts)


def parsed(line: bytes) -> Any:
    """Returns the JSON value of a line; None if it is damaged or too deep."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return value if _is_shallow(value) else None


def _is_shallow(value: Any) -> bool:
    """Returns whether lists and objects are nested at most _MAX_DEPTH deep, without recursion."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _inner(outer)]
        if not level:
            return True
    return False


def _inner(value: Any) -> Iterator[Any] | Sequence[Any]:
    """Returns the lists and objects directly inside of a value."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (inner for inner in values if isinstance(inner, dict | list))


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases, with which a small file describes a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)
