"""Finds the rollouts whose task or conversation holds a text, in the background.

A rollout takes milliseconds to read, so that all of a large run take minutes. A search reads the rollouts
that the other filters select, the newest first, and keeps what it found; a page shows how far it is. Rollouts
that a live run adds are read when the page asks again.

Python runs one thread at a time, and a page's thread would wait for the search's at every row that it gets
from sqlite. So the search rests while a page is made.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gymexp.errors import RunDirectoryError
from gymexp.view.filters import Selection
from gymexp.view.messages import conversation_of, verdict_of
from gymexp.view.run_files import RunFiles, key_of, parsed
from gymexp.view.run_index import RunIndex
from gymexp.view.task_rows import TaskRows

_AT_ONCE = 1_000  # rollouts, between two looks for a newer question
_REST_S = 1.0  # at most, for each rollout
_KEPT = 8  # needles whose results are kept
_AROUND = (40, 100)  # characters shown before and after the beginning of what was found
_LETTERS = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Progress:
    """How many of the selected rollouts a search has read, and how many of those could not be read."""

    num: int
    num_searched: int
    num_unreadable: int

    @property
    def is_done(self) -> bool:
        return self.num_searched == self.num


class TextSearch:
    """The searches of one run. One of them is worked on at a time: that which was asked for last."""

    def __init__(self, files: RunFiles, index: RunIndex, tasks: TaskRows) -> None:
        self._files = files
        self._index = index
        self._tasks = tasks
        self._changed = threading.Condition()
        self._wanted: Selection | None = None  # None while no thread works
        self._needles: list[str] = []
        self._num_pages = 0  # that are made now, without those that wait for the search
        self.version = 0  # rises whenever a search has read some rollouts

    def find(self, chosen: Selection, patience_s: float) -> Progress | None:
        """Goes on with the search of a selection for at most patience_s, and in the background afterwards.
        Returns how far it is; None if the selection has no text."""
        if chosen.needle is None:
            return None
        if (found := self._progress(chosen)).is_done:
            return found
        with self._changed:
            is_idle = self._wanted is None
            if chosen != self._wanted:
                self._wanted = chosen
            self._forget_others(chosen.needle)
            if is_idle:
                threading.Thread(target=self._work, name="text search", daemon=True).start()
            if patience_s > 0:
                self._num_pages -= 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._wanted != chosen, patience_s)
                self._num_pages += 1
        return self._progress(chosen)

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Lets the search rest while a page is made, except in `find`."""
        with self._changed:
            self._num_pages += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_pages -= 1
                self._changed.notify_all()

    def _progress(self, chosen: Selection) -> Progress:
        [found] = self._index.query(
            "SELECT COUNT(*) AS num, COUNT(s.number) AS searched, COALESCE(SUM(NOT s.is_read), 0) AS lost "
            f"FROM (SELECT file, number FROM rollouts WHERE {chosen.others}) AS r "
            "LEFT JOIN searched AS s ON s.needle = :needle AND s.file = r.file AND s.number = r.number",
            chosen.parameters,
        )
        return Progress(found["num"], found["searched"], found["lost"])

    def _forget_others(self, needle: str) -> None:
        if needle in self._needles:
            self._needles.remove(needle)
        self._needles.append(needle)
        while len(self._needles) > _KEPT:
            self._index.forget_search(self._needles.pop(0))

    def _work(self) -> None:
        try:
            while not self._is_answered():
                pass
        except BaseException:
            self._wanted = None  # the next question starts a new thread
            raise

    def _is_answered(self) -> bool:
        chosen = self._wanted
        assert chosen is not None
        if not self._read_some(chosen):
            return False
        with self._changed:
            if self._wanted is not chosen:
                return False
            self._wanted = None
            self._changed.notify_all()
            return True

    def _read_some(self, chosen: Selection) -> bool:
        """Reads rollouts of a selection until another one is asked for. Returns whether none is left."""
        generation = self._index.generation
        rows = self._index.query(
            "SELECT file, number, key, offset, length, line FROM rollouts "
            f"WHERE {chosen.others} AND (file, number) NOT IN "
            "(SELECT file, number FROM searched WHERE needle = :needle) "
            "ORDER BY step DESC, file, offset LIMIT :at_once",
            chosen.parameters | {"at_once": _AT_ONCE},
        )
        needle = chosen.needle or ""
        for _, frame in itertools.groupby(rows, key=lambda row: (row["file"], row["offset"])):
            if self._wanted is not chosen:
                return False
            self._index.keep_searched(needle, list(self._in_frame(list(frame), needle)), generation)
            self.version += 1
        return not rows

    def _in_frame(
        self, rows: Sequence[Mapping[str, Any]], needle: str
    ) -> Iterator[tuple[str, int, str | None, bool]]:
        """Yields (file, number, what was found, whether it could be read) of rollouts of one frame."""
        first = rows[0]
        try:
            lines = self._files.read_frame(
                f"rollouts/{first['file']}.jsonl.zst", first["offset"], first["length"]
            )
        except RunDirectoryError:
            lines = []
        asked: dict[str, str | None] = {}
        for row in rows:
            with self._changed:
                self._changed.wait_for(lambda: self._num_pages <= 0, _REST_S)
            key = row["key"]
            if key not in asked:
                asked[key] = self._in_task(key, needle) or excerpt([("key", key)], needle)
            line = lines[row["line"]] if row["line"] < len(lines) else b""
            found = in_line(line, key, needle) or asked[key]
            yield row["file"], row["number"], found, bool(line)

    def _in_task(self, key: str, needle: str) -> str | None:
        task = self._tasks.read(key)
        if task is None:
            return None
        return excerpt(((m.who, m.text) for m in conversation_of({}, task)), needle)


def in_line(line: bytes, key: str, needle: str) -> str | None:
    """Returns where a line of a file of rollouts holds a text, as `excerpt`; None if it does not.

    needle: casefolded. Only the texts count that a page shows, not the token ids and log-probabilities beside
    them. These make most of a line, so that a line without the needle's letters is not parsed.
    """
    folded = line.decode("utf-8", errors="replace").casefold()
    letters = max(_LETTERS.findall(needle), key=len, default="")
    if letters not in folded and "\\u" not in folded:
        return None
    record = parsed(line)
    if not isinstance(record, dict) or key_of(record) != key:
        return None
    texts = [(m.who, m.text) for m in conversation_of(record, {})]
    return excerpt([*texts, *verdict_of(record).items()], needle)


def excerpt(texts: Iterable[tuple[str, str]], needle: str) -> str | None:
    """Returns who wrote a text, and its part around the first occurrence of a casefolded needle, in a line;
    None if no text holds it."""
    for who, text in texts:
        folded = text.casefold()
        at = folded.find(needle)
        if at >= 0:
            if len(folded) != len(text):  # as ß becomes ss
                ends = itertools.accumulate(len(letter.casefold()) for letter in text)
                at = next(place for place, end in enumerate(ends) if end > at)
            start, end = max(0, at - _AROUND[0]), at + _AROUND[1]
            part = " ".join(text[start:end].split())
            return f"{who[:40]}: {'…' if start else ''}{part}{'…' if end < len(text) else ''}"
    return None
