"""A run as the viewer shows it: its files, its rollouts, its metrics, its state."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymexp.errors import RunDirectoryError
from gymexp.record.line_follower import Followed
from gymexp.record.own_files import check_own, parsed
from gymexp.record.run_state import RunState, read_run
from gymexp.view.run_files import RunFiles
from gymexp.view.run_index import RunIndex
from gymexp.view.task_rows import TaskRows
from gymexp.view.text_search import TextSearch
from gymexp.view.token_text import find_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FRESH_S = 0.5  # within which a page does not look for news again


class ViewedRun:
    """One run. slug: its name in URLs."""

    def __init__(self, path: Path, slug: str, tokenizer: Path | None) -> None:
        self.files = RunFiles(path)
        self.path = self.files.path
        self.slug = slug
        self.name = " / ".join(self.path.parts[-2:])
        self.index = RunIndex(self.files)
        self.tasks = TaskRows(self.files)
        self.search = TextSearch(self.files, self.index, self.tasks)
        self._own_tokenizer = tokenizer
        self._metrics = Followed(lambda: self.files.open("metrics.jsonl"))
        self._entries: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._looked_at = 0.0
        self._stamp: tuple[Any, ...] = ()
        self.version = 0  # rises whenever a page of the run may have changed

    def refresh(self) -> None:
        """Reads what the run has written since the last call."""
        with self._lock:
            if self.index.is_ready and time.monotonic() - self._looked_at < _FRESH_S:
                return
            self._looked_at = time.monotonic()
        self.index.refresh()
        stamp = (self.index.version, *map(self._mark, ("metrics.jsonl", "status.json", "result.json")))
        if stamp != self._stamp:
            self._stamp = stamp
            self.version += 1

    def _mark(self, name: str) -> tuple[int, int] | None:
        try:
            status = (self.path / name).lstat()
        except OSError:
            return None
        # A running controller writes status.json every second; only its text's length would tell the pages.
        return (status.st_ino if name == "result.json" else 0, status.st_size)

    @property
    def metrics(self) -> dict[int, dict[str, Any]]:
        """The entries of metrics.jsonl of training steps, by step."""
        with self._lock:
            for is_anew, lines, _ in self._metrics.batches():
                if is_anew:
                    self._entries.clear()
                for entry in map(parsed, lines):
                    if isinstance(entry, dict) and "time/step" in entry and type(entry.get("step")) is int:
                        self._entries[entry["step"]] = entry
            return dict(self._entries)

    def state(self) -> RunState:
        """Returns how the run stands. Raises RunDirectoryError if one of its files leads out of it."""
        self.check()
        return read_run(self.path)

    def check(self) -> None:
        """Raises RunDirectoryError if a file that other modules read is no plain file of the directory."""
        check_own(self.path)

    @cached_property
    def _tokenizer(self) -> tuple[Tokenizer | None, str]:
        try:
            return find_tokenizer(self.files, self.files.read_config(), self._own_tokenizer)
        except RunDirectoryError as error:
            return None, str(error)

    def tokenizer(self) -> tuple[Tokenizer | None, str]:
        """Returns the run's tokenizer, or None and why there is none."""
        found = self._tokenizer
        if found[0] is None:
            del self._tokenizer  # a live run may save it later
        return found


def runs_at(paths: Iterable[Path], tokenizer: Path | None) -> dict[str, ViewedRun]:
    """Returns the runs in directories, by slug. A sweep stands for its jobs. Raises RunDirectoryError if a
    directory has neither."""
    found: dict[str, ViewedRun] = {}
    for path in paths:
        for directory in _expanded(path.resolve()):
            slug = base = re.sub(r"[^\w.-]+", "_", ".".join(directory.parts[-2:])).strip("._") or "run"
            number = 1
            while slug in found and found[slug].path != directory:
                number += 1
                slug = f"{base}.{number}"
            found.setdefault(slug, ViewedRun(directory, slug, tokenizer))
    return found


def _expanded(path: Path) -> list[Path]:
    if (path / "sweep.json").exists():
        jobs = [job for job in path.iterdir() if job.name.isdigit() and _is_run(job)]
        if not jobs:
            raise RunDirectoryError(f"{path} must be a sweep of which a job has begun, but none has yet")
        return sorted(jobs, key=lambda job: int(job.name))
    if not _is_run(path):
        raise RunDirectoryError(
            f"{path} must be the directory of a run, of a sweep or of an evaluation, but has neither "
            "config.yaml nor rollouts/: say e.g. outputs/<name>/<date_time>"
        )
    return [path]


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").exists() or (path / "rollouts").is_dir()
