"""Files that are written whole or not at all, and file system errors as messages that say what to do.

A full disk, a deleted directory or a read-only folder raises an OSError in the code that writes; its errno
decides which advice the message gives.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gymexp.errors import GymexpError
from gymexp.printable import printable_in

FULL = (errno.ENOSPC, errno.EDQUOT)
_ADVICE = {
    errno.ENOSPC: "make room on this disk",
    errno.EDQUOT: "make room on this disk, or ask for a larger quota",
    errno.EFBIG: "raise the limit on a file's size (`ulimit -f`)",
    errno.EROFS: "mount its file system for writing",
    errno.EACCES: "ask its owner for the right to write",
    errno.EPERM: "ask its owner for the right to write",
    errno.ENOENT: "it was deleted or moved: put it back",
    errno.ENOTDIR: "a file is where a folder must be: move the file out of the way",
    errno.EEXIST: "a file is where a folder must be: move the file out of the way",
    errno.EIO: "the disk, or the connection to it, fails",
    errno.ESTALE: "the disk, or the connection to it, fails",
    errno.EMFILE: "the process has as many open files as it may have: raise the limit (`ulimit -n`)",
    errno.ENFILE: "this machine has as many open files as it allows",
}


def refusal(error: BaseException) -> OSError | None:
    """Returns the file system error behind an exception, its causes included; None if there is none."""
    if isinstance(error, OSError) and error.errno in _ADVICE and not isinstance(error, ConnectionError):
        return error
    if match := re.search(r"\(os error (\d+)\)", str(error)):  # the format of Rust libraries: safetensors
        return OSError(int(match[1]), os.strerror(int(match[1])))
    return refusal(error.__cause__) if error.__cause__ else None


def in_words(error: OSError, instead: str = "") -> str:
    """Returns the message of a file system error: path, reason and what to do.

    instead: an alternative to the usual advice, for a caller that could write to another place.
    """
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    full = error.errno in FULL
    room = f" ({_free_mb(Path(path)):.0f} MB free there)" if full and path else ""
    advice = _ADVICE.get(error.errno or 0, "")
    return (
        (f"cannot use {path}: " if path else "")
        + f"{error.strerror or type(error).__name__}{room}"
        + "".join([f": {advice}" if advice else "", f", or {instead}" if instead else ""])
    )


@contextlib.contextmanager
def as_gymexp_errors() -> Iterator[None]:
    """Raises GymexpError, with advice, in place of a file system error of the block or decorated function."""
    try:
        yield
    except GymexpError:
        raise
    except Exception as error:
        if (os_error := refusal(error)) is None:
            raise
        raise GymexpError(in_words(os_error)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; the file written to it replaces `path` when the block ends.

    If the block fails, `path` keeps its old content and the temporary file is removed.
    """
    part = path.with_name(f"{path.name}.part")
    with at(path):
        part.unlink(missing_ok=True)
        try:
            yield part
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


@contextlib.contextmanager
def at(path: Path) -> Iterator[None]:
    """Sets `path` as the file name of an OSError of the block that names no file: a failed write does not."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def _free_mb(path: Path) -> float:
    existing = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    return shutil.disk_usage(existing).free / 2**20


def replace_file(path: Path, text: str, mode: int = 0o666) -> None:
    """Writes a file so that a reader sees the old text or the new text, never a part of it.

    mode: the file's permissions, from which the umask is removed.
    """
    with replacing(path) as part:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends a JSON object to a JSONL file. If the last line was cut short, the object starts a new line."""
    with at(path), path.open("a+b") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) and file.read() != b"\n":
            file.write(b"\n")
        file.write(json.dumps(printable_in(record)).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; {} if the file is missing or damaged (full disk, power loss)."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a JSONL file, without lines that are damaged or still being written."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    records = []
    for line in lines:
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
