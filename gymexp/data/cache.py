"""The data cache: entries named by the hash of what decides their content, each made once and completely."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock, Timeout

from gymexp.errors import DataError
from gymexp.files import at
from gymexp.record.places import cache_refused

_FORMAT = 1  # part of every key: raise it when the content of an entry changes
_LOCK_TIMEOUT_S = 3600.0
_INDEX = "entry.json"

Say = Callable[[str], None]


def cached(
    cache: Path, label: str, determined_by: dict[str, Any], make: Callable[[Path], None], say: Say
) -> tuple[Path, dict[str, str]]:
    """Returns the directory of one cache entry, and the SHA-256 of each of its files by name.

    make: fills the directory of a new entry. determined_by: everything that decides the content, as JSON-able
    values; its hash is in the entry's name. An entry whose files do not match their hashes is made again. If
    two processes want the same entry, one makes it and the other waits.
    Raises DataError if the cache cannot be used, or if another process keeps the lock for an hour.
    """
    key = hashlib.sha256(orjson.dumps([_FORMAT, determined_by], option=orjson.OPT_SORT_KEYS)).hexdigest()
    entry = cache / "data" / f"{label}-{key[:16]}"
    try:
        with at(entry.parent):
            entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(Path(f"{entry}.lock"), label, say):
            if (hashes := _hashes_if_intact(entry)) is not None:
                return entry, hashes
            if entry.exists():
                say(f"{label}: the cache entry {entry} is damaged, making it again")
                shutil.rmtree(entry)
            with at(entry):
                return entry, _make(entry, determined_by, make)
    except OSError as error:
        if (hashes := _hashes_if_intact(entry)) is not None:  # a cache that others fill may be read-only
            return entry, hashes
        raise DataError(cache_refused(error)) from None


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(lock_file: Path, label: str, say: Say) -> Iterator[None]:
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{label}: another run is making this data, waiting for it")
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_S)
        except Timeout:
            raise DataError(
                f"another process has held {lock_file} for {_LOCK_TIMEOUT_S:.0f} s: "
                "end that process, or set GYMEXP_CACHE to another directory"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _hashes_if_intact(entry: Path) -> dict[str, str] | None:
    """Returns the entry's hashes, or None if the entry is missing or a file no longer matches its hash."""
    try:
        hashes = json.loads((entry / _INDEX).read_text())["sha256"]
        return hashes if all(sha256_of(entry / name) == value for name, value in hashes.items()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _make(entry: Path, determined_by: dict[str, Any], make: Callable[[Path], None]) -> dict[str, str]:
    part = entry.with_name(f".{entry.name}.part")  # no other process writes to it: this one has the lock
    shutil.rmtree(part, ignore_errors=True)  # a run that was killed may have left one
    try:
        part.mkdir()
        make(part)
        hashes = {file.name: sha256_of(file) for file in sorted(part.iterdir())}
        index = {"sha256": hashes, "determined_by": determined_by}
        (part / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
        os.replace(part, entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return hashes
