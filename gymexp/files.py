"""What a file system refuses, in words of the user's world.

A full disk, a directory that was deleted, a folder that is read-only: whoever writes gets an OSError for it,
and its number decides what there is to do.
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
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or have your quota raised",
    errno.EFBIG: "raise the limit on a file's size (`ulimit -f`), or make room there",
    errno.EROFS: "have it mounted for writing",
    errno.EACCES: "have its owner let you write there",
    errno.EPERM: "have its owner let you write there",
    errno.ENOENT: "it was deleted, or moved, and has to be there",
    errno.ENOTDIR: "a file is where a folder has to be: move it out of the way",
    errno.EEXIST: "a file is where a folder has to be: move it out of the way",
    errno.EIO: "the disk, or the way to it, fails",
    errno.ESTALE: "the disk, or the way to it, fails",
    errno.EMFILE: "more files are open than a process may have: raise the limit (`ulimit -n`)",
    errno.ENFILE: "more files are open than this machine allows",
}


def refusal(error: BaseException) -> OSError | None:
    """What the file system refused, where this is what an exception tells of; None of any other."""
    if isinstance(error, OSError) and error.errno in _ADVICE and not isinstance(error, ConnectionError):
        return error
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # as Rust's libraries say it: safetensors
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return refusal(error.__cause__) if error.__cause__ else None


def in_words(error: OSError, instead: str = "") -> str:
    """Path, reason, and what to do. instead: what else there is to do, where another place would serve."""
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
def told() -> Iterator[None]:
    """Raises GymexpError in place of what the file system refuses in this block."""
    try:
        yield
    except GymexpError:
        raise
    except Exception as error:
        if (found := refusal(error)) is None:
            raise
        raise GymexpError(in_words(found)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` for what is to take its place, whole or not at all: nothing of it is left after
    a failure."""
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
    """What is refused in this block is refused at `path`, where the system does not say: it names no file
    where a write fails."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def _free_mb(path: Path) -> float:
    there = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    return shutil.disk_usage(there).free / 2**20


def replace_file(path: Path, text: str, mode: int = 0o666) -> None:
    """Write so that a reader sees the old text or the new one, never a part. mode: less the umask."""
    with replacing(path) as part:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add an object to a file of one a line; on a line of its own, also after one that was cut short."""
    with at(path), path.open("a+b") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) and file.read() != b"\n":
            file.write(b"\n")
        file.write(json.dumps(printable_in(record)).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds; an empty one where there is no file, or a damaged one (a full disk, a
    machine that lost power)."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of one a line, without lines that are damaged or still being written."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for line in lines:
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]
