"""Reads a run directory that a stranger may have made: its own plain files alone, and within bounds.

A link, a named pipe or a device in a directory that was unpacked from an archive would make a reader show
another file, or wait for ever. A small file can decompress to terabytes. A link to a folder of the same run
on another disk is followed (`gymexp.record.linked_folders`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import zstandard

from gymexp.errors import RunDirectoryError
from gymexp.record.linked_folders import own_links, why_refused

MAX_FRAME = 256 << 20  # bytes of a frame after decompression
_MAX_DEPTH = 60  # of a JSON value, in lists and objects
# What the commands read of a run directory, beside logs/, rollouts/ and weights.
_READ = (
    "status.json", "result.json", "results.json", "evaluation.json", "tasks.json", "metrics.jsonl",
    "timeline.jsonl", "system.jsonl", "config.yaml", "overrides.yaml", "job.yaml", "trial.json",
    "versions.txt", "data/train.jsonl", "data/validation.jsonl", "data/mix.json", "code/git-commit.txt",
    "code/git-diff.txt", "rollouts/index.jsonl", "rollouts/train_index.jsonl",
)  # fmt: skip


def check_own(run: Path) -> None:
    """Raises RunDirectoryError unless all that a command reads of a run directory, when it is there, is a
    plain file of that directory."""
    for path in (*(run / name for name in _READ), *(run / "logs").glob("*.log")):
        check_own_file(run, path)


def check_own_file(run: Path, path: Path) -> None:
    """Raises RunDirectoryError if there is something at `path` that is no plain file of the run directory."""
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError, ValueError):
        return  # nothing is there, or a link that leads nowhere
    # The code of a sweep's job is that of its sweep.
    places = [run.resolve(), *([run.resolve().parent / "code"] if path.parent == run / "code" else ())]
    if not any(map(real.is_relative_to, places)) and not any(map(real.is_relative_to, own_links(run, path))):
        raise RunDirectoryError(f"{path} must be a file of the run directory, but {why_refused(run, path)}")
    if not stat.S_ISREG(mode):
        raise RunDirectoryError(f"{path} must be a plain file")


def open_own(run: Path, path: Path) -> BinaryIO | None:
    """Opens a file of the run directory; None if there is none. Raises RunDirectoryError as
    `check_own_file`."""
    check_own_file(run, path)
    try:
        # Without O_NONBLOCK the open of a named pipe would wait for its writer.
        descriptor = os.open(path.resolve(), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RunDirectoryError(f"{path} must be a plain file")
    return os.fdopen(descriptor, "rb")


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
