"""The rollouts of a run in sqlite, in memory: filled from the index of the run directory and kept up to date.

A live run appends to its index. A resumed run takes lines back, and replaces the file: the table is then
filled anew. A line that is damaged, or was written by someone else, is left out and counted.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gymexp.errors import RunDirectoryError
from gymexp.record.line_follower import Followed
from gymexp.record.own_files import parsed
from gymexp.rollout.rollout_files import is_rollout_file, older_summary, success_rewards_of, with_places
from gymexp.view.run_files import RunFiles

COLUMNS = {
    "file": str, "step": int, "split": str, "number": int, "grp": int, "idx": int, "key": str, "env": str,
    "outcome": str, "why": str, "reward": float, "success": int, "advantage": float, "turns": int,
    "tokens": int, "trained": int, "prompt_tokens": int, "nll": float, "ratio_max": float, "tool_calls": int,
    "tool_errors": int, "began": float, "total_s": float, "policy_s": float, "queue_s": float, "seed": int,
    "replica": str, "weights_version": int, "retries": int, "text": str, "offset": int, "length": int,
    "line": int,
}  # fmt: skip
_SPLITS = {"step": "train", "eval": "held-out", "filtered": "left out"}
_OUTCOMES = ("completed", "truncated", "failed")
_TYPES = {str: "TEXT", int: "INTEGER", float: "REAL"}


class RunIndex:
    """The table of one run. `query` may be called from any thread; `refresh` from one at a time."""

    def __init__(self, files: RunFiles) -> None:
        self.files = files
        self.num_damaged = 0
        self.version = 0  # rises whenever the table changes
        self.generation = 0  # rises whenever rows are taken back
        self.progress = 0.0  # share of the index that the first refresh has read
        self.is_ready = False
        self._is_fixed = False
        self.error = ""
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._followed = {
            name: Followed(lambda name=name: files.open(f"rollouts/{name}.jsonl"))
            for name in ("index", "train_index")
        }
        self._old: set[tuple[str, int, int]] = set()  # the files read of a run that has no index
        self._db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        columns = ", ".join(f"{name} {_TYPES[kind]}" for name, kind in COLUMNS.items())
        self._db.executescript(
            f"CREATE TABLE rollouts ({columns}, PRIMARY KEY (file, number)) WITHOUT ROWID;"
            "CREATE INDEX by_key ON rollouts (key); CREATE INDEX by_step ON rollouts (step);"
            "CREATE TABLE trained (file TEXT, number INTEGER, offset INTEGER, length INTEGER, line INTEGER, "
            "PRIMARY KEY (file, number)) WITHOUT ROWID;"
            # What a search for a text has read of a rollout. found: the text's place; NULL without one.
            "CREATE TABLE searched (needle TEXT, file TEXT, number INTEGER, found TEXT, is_read INTEGER, "
            "PRIMARY KEY (needle, file, number)) WITHOUT ROWID;"
        )

    def query(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
        """Returns the rows of a query."""
        with self._lock:
            return [dict(row) for row in self._db.execute(sql, parameters)]

    def row(self, file: str, number: int) -> dict[str, Any] | None:
        """Returns a rollout's row; None if there is none."""
        found = self.query("SELECT * FROM rollouts WHERE file = ? AND number = ?", (file, number))
        return found[0] if found else None

    def read_trained(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns what the trainer wrote of a rollout; None if it wrote nothing of it."""
        where = (row["file"], row["number"])
        found = self.query("SELECT * FROM trained WHERE file = ? AND number = ?", where)
        if not found:
            return None
        at = found[0]
        name = f"rollouts/{row['file']}.train.jsonl.zst"
        try:
            lines = self.files.read_frame(name, at["offset"], at["length"])
        except RunDirectoryError:
            return None
        record = parsed(lines[at["line"]]) if at["line"] < len(lines) else None
        return record if isinstance(record, dict) and record.get("number") == row["number"] else None

    def keep_searched(
        self, needle: str, found: Sequence[tuple[str, int, str | None, bool]], generation: int
    ) -> None:
        """Keeps what a search has read, (file, number, what was found, whether it could be read), unless rows
        were taken back since this generation."""
        rows = [(needle, *one) for one in found]
        with self._lock:
            if generation == self.generation:
                self._db.executemany("INSERT OR REPLACE INTO searched VALUES (?, ?, ?, ?, ?)", rows)

    def forget_search(self, needle: str) -> None:
        """Removes what a search has found."""
        with self._lock:
            self._db.execute("DELETE FROM searched WHERE needle = ?", (needle,))

    def keep(self, groups: Sequence[tuple[str, int]]) -> int:
        """Removes the rollouts of all other groups, (file, group), from the table, which is not refreshed any
        more. Returns the number of rollouts that are left."""
        with self._lock:
            self._db.execute("CREATE TEMP TABLE kept (file TEXT, grp INTEGER)")
            self._db.executemany("INSERT INTO kept VALUES (?, ?)", groups)
            self._db.execute("DELETE FROM rollouts WHERE (file, grp) NOT IN (SELECT file, grp FROM kept)")
            self._is_fixed = True
            return self._db.execute("SELECT COUNT(*) FROM rollouts").fetchone()[0]

    def refresh(self) -> None:
        """Reads what the run has written since the last call. A call during another one returns at once, but
        during the first one it waits, as there is nothing yet to show."""
        if self._is_fixed or not self._refreshing.acquire(blocking=not self.is_ready):
            return
        try:
            self.error = ""
            if (self.files.path / "rollouts" / "index.jsonl").exists():
                self._read_index()
            else:
                self._read_old_files()
        except RunDirectoryError as error:
            self.error = str(error)
        finally:
            self.progress, self.is_ready = 1.0, True
            self._refreshing.release()

    def _read_index(self) -> None:
        for name, table, make in (("index", "rollouts", _rollout), ("train_index", "trained", _trained)):
            for is_anew, lines, share in self._followed[name].batches():
                rows = [make(parsed(line)) for line in lines]
                with self._lock:
                    self._db.execute("BEGIN")
                    if is_anew:
                        self._db.execute(f"DELETE FROM {table}")
                        if table == "rollouts":
                            self._db.execute("DELETE FROM searched")
                            self.generation += 1
                            self._old.clear()
                            self.num_damaged = 0
                            self._followed["train_index"].forget()  # its columns were in the rows
                    self._insert(table, (row for row in rows if row))
                    self._db.execute("COMMIT")
                self.num_damaged += sum(row is None for row in rows) if table == "rollouts" else 0
                self.progress = share
                self.version += 1

    def _insert(self, table: str, rows: Iterable[dict[str, Any]]) -> None:
        if table == "rollouts":
            names = ", ".join(COLUMNS)
            marks = ", ".join(f":{name}" for name in COLUMNS)
            self._db.executemany(f"INSERT OR REPLACE INTO rollouts ({names}) VALUES ({marks})", rows)
            return
        rows = list(rows)
        self._db.executemany(
            "INSERT OR REPLACE INTO trained VALUES (:file, :number, :offset, :length, :line)", rows
        )
        self._db.executemany(
            "UPDATE rollouts SET advantage = :advantage, trained = :trained, ratio_max = :ratio_max "
            "WHERE file = :file AND number = :number",
            rows,
        )

    def _read_old_files(self) -> None:
        """Fills the table of a run from before index.jsonl, by parsing its files of rollouts."""
        success_rewards = success_rewards_of(self.files.read_config())
        names = self.files.names("rollouts", ".jsonl.zst")
        stems = [name.removesuffix(".jsonl.zst") for name in names]
        for number, stem in enumerate(filter(is_rollout_file, stems), 1):
            path = self.files.path / "rollouts" / f"{stem}.jsonl.zst"
            try:
                status = path.lstat()
            except OSError:
                continue
            mark = (stem, status.st_size, status.st_mtime_ns)
            if mark in self._old:
                continue
            rows = list(_old_rows(self.files, stem, status.st_size, success_rewards))
            with self._lock:
                self._db.execute("BEGIN")
                self._db.execute("DELETE FROM rollouts WHERE file = ?", (stem,))
                self._db.execute("DELETE FROM searched WHERE file = ?", (stem,))
                self.generation += 1
                self._insert("rollouts", rows)
                self._db.execute("COMMIT")
            self._old = {m for m in self._old if m[0] != stem} | {mark}
            self.progress = number / len(stems)
            self.version += 1


def _rollout(row: Any) -> dict[str, Any] | None:
    """Returns a line of the index as a row of the table; None if the line is none that gymexp writes."""
    if not isinstance(row, dict) or not is_rollout_file(row.get("file")):
        return None
    seconds = row["seconds"] if isinstance(row.get("seconds"), dict) else {}
    failures = row["failures"] if isinstance(row.get("failures"), list) else []
    kind, _, step = row["file"].partition("-")
    why = row.get("limit") or row.get("cause") or ("refused" if row.get("refused") else "")
    values = row | {
        "step": int(step),
        "split": _SPLITS[kind],
        "grp": row.get("group"),
        "idx": row.get("index"),
        "why": why,
        "total_s": seconds.get("total"),
        "policy_s": seconds.get("policy"),
        "queue_s": seconds.get("queue"),
        "retries": len(failures) - (row.get("outcome") == "failed" and bool(failures)),
        "advantage": None,
        "trained": None,
        "ratio_max": None,
    }
    whole = {name: _value(values.get(name), kind) for name, kind in COLUMNS.items()}
    needed = ("number", "grp", "key", "env", "offset", "length", "line")
    if any(whole[name] is None for name in needed) or whole["outcome"] not in _OUTCOMES:
        return None
    sizes = (whole[name] for name in ("number", "grp", "offset", "length", "line"))
    return None if any(size < 0 for size in sizes) else whole


def _trained(row: Any) -> dict[str, Any] | None:
    """Returns a line of train_index.jsonl as a row of the table; None if it is none that gymexp writes."""
    if not isinstance(row, dict) or not is_rollout_file(row.get("file")):
        return None
    names = ("file", "number", "offset", "length", "line", "advantage", "trained", "ratio_max")
    values = {name: _value(row.get(name), COLUMNS[name]) for name in names}
    sizes = [values[name] for name in ("number", "offset", "length", "line")]
    return values if all(size is not None and size >= 0 for size in sizes) else None


def _value(value: Any, kind: type) -> Any:
    """Returns a value for a column of this type; None if it has another type or does not fit."""
    if kind is str:
        return value[:2000].encode(errors="replace").decode() if isinstance(value, str) else None
    if isinstance(value, bool):
        return int(value)
    if kind is int:
        return value if isinstance(value, int) and abs(value) < 1 << 62 else None
    is_number = isinstance(value, int | float) and abs(value) < 1e300
    return float(value) if is_number else None


def _old_rows(
    files: RunFiles, stem: str, size: int, success_rewards: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file whose rollouts no index lists."""
    summaries: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(files.read_frame(f"rollouts/{stem}.jsonl.zst", 0, size)):
        with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError, OverflowError):
            summary = older_summary(parsed(line), success_rewards)
            if isinstance(summary["key"], str):
                summaries.append((number, summary))
    for row in with_places(stem, size, summaries):
        if whole := _rollout(row):
            yield whole
