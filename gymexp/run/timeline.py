"""timeline.jsonl: the events and phases of a run, and the spans of its steps, which the trainer measures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from gymexp.processes import clock
from gymexp.record.directory import RunDirectory


class Timeline:
    """Writes timeline.jsonl from what the controller does and from what the trainer reports."""

    def __init__(self, directory: RunDirectory, say: Callable[[str], None] = lambda _: None) -> None:
        """say: shows the user a remark of the trainer's."""
        self._say = say
        self._directory = directory
        self._has_played = False
        self._num_entries = 0  # the trainer's entries taken so far

    def note(self, **fields: Any) -> None:
        """Appends an event or a phase. Its `seconds` count from this process's start, which is when the user
        gave the command; those of a span are its duration."""
        since = round(clock.since_start(), 2)
        self._directory.note({"time": round(time.time(), 3), "seconds": since, **fields})

    def follow(self, before: Mapping[str, Any], facts: dict[str, Any]) -> list[dict[str, Any]]:
        """Takes the entries out of a report of the trainer, and notes what is new in it.

        before: the facts of the report before. Returns the log entries that were not reported before: the
        trainer sends entries again if our reply was lost.
        """
        if facts.get("phase") != before.get("phase"):
            self.note(phase=facts.get("phase"))
        if facts.get("done") and not self._has_played:
            self._has_played = True
            self.note(event="first rollout")
        logs = []
        for entry in facts.pop("entries", []):
            if entry["number"] <= self._num_entries:
                continue
            self._num_entries = entry["number"]
            if "span" in entry:
                self._directory.note(entry["span"])
            elif "remark" in entry:
                self._say(entry["remark"])
                self.note(event="remark", text=entry["remark"])
            else:
                logs.append(entry)
        return logs
