"""Follows a JSONL file of a run directory that grows, and may be replaced or cut by a resumed run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

MAX_LINE = 1 << 20  # bytes of a line
_KEPT = 4096  # bytes before the position that has been read, by which a replaced file is noticed
_BATCH = 2000  # lines
_MAX_BATCH = 8 << 20  # bytes


class Followed:
    """A JSONL file that grows, and may be replaced or cut."""

    def __init__(self, open_file: Callable[[], BinaryIO | None]) -> None:
        """open_file: opens the file; None if there is none."""
        self._open = open_file
        self.forget()

    def forget(self) -> None:
        """Makes the next call of `batches` begin at the file's start."""
        self._at = 0
        self._before = b""  # hash of the bytes before the position
        self._inode = -1

    def batches(self) -> Iterator[tuple[bool, list[bytes], float]]:
        """Yields (whether the file is read anew, whole lines, share read so far)."""
        file = self._open()
        if file is None:
            if self._at:
                self.forget()
                yield True, [], 1.0
            return
        with file:
            status = os.fstat(file.fileno())
            is_anew = status.st_ino != self._inode or status.st_size < self._at
            is_anew = is_anew or self._hash_before(file) != self._before
            if is_anew:
                self.forget()
                self._inode = status.st_ino
            file.seek(self._at)
            while True:
                lines, size = _whole_lines(file)
                if not size and not is_anew:
                    break
                self._at += size
                self._before = self._hash_before(file)
                file.seek(self._at)
                yield is_anew, lines, min(1.0, self._at / (status.st_size or 1))
                is_anew = False
                if not size:
                    break

    def _hash_before(self, file: BinaryIO) -> bytes:
        start = max(0, self._at - _KEPT)
        file.seek(start)
        return hashlib.blake2b(file.read(self._at - start)).digest() if self._at else b""


def _whole_lines(file: BinaryIO) -> tuple[list[bytes], int]:
    """Returns the next whole lines of a file, at most _BATCH, and their size. A line that is too long is
    returned as an empty one."""
    content = file.read(_MAX_BATCH)
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        if len(content) < _MAX_BATCH:
            return [], 0  # still being written
        return [b""], len(content)
    lines = whole.splitlines(keepends=True)[:_BATCH]
    return [line if len(line) <= MAX_LINE else b"" for line in lines], sum(map(len, lines))
