"""Makes a run's report.html beside the run: in a process of low priority that can fail nothing.

At each evaluation, else at most once a minute, and at the end. There is one process at a time, with a
deadline; one that fails or takes too long leaves a line in logs/report.log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gymexp.processes.process import Child, ended, spawn
from gymexp.record.metric_names import by_env

EVERY_S = 60.0
DEADLINE_S = 60.0  # of one process
AFTER_SIGNAL_S = 5.0  # the time of the last report after a signal
_POLL_S = 0.2
_KILL_S = 10.0
_NICENESS = 15


class Reports:
    """Makes the reports of one run, until `end`."""

    def __init__(
        self,
        run: Path,
        hurried: Callable[[], bool],
        command: Sequence[str] = (sys.executable, "-m", "gymexp.report"),
        every_s: float = EVERY_S,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """hurried: whether the run ends at once, without reports. command: makes the report of the directory
        that is its last argument."""
        self._hurried = hurried
        self._command = [*command, str(run)]
        self._log = run / "logs" / "report.log"
        self._every_s = every_s
        self._deadline_s = deadline_s
        self._is_due = False
        self._keeping = asyncio.create_task(self._keep())

    def ask(self, logs: Mapping[str, Any]) -> None:
        """Makes a report soon if a new entry of the log is an evaluation's."""
        self._is_due = self._is_due or bool(by_env(logs, held_out=True))

    async def end(self, by_signal: bool) -> None:
        """Makes the last report, within its deadline. After a signal it has a few seconds. No process of a
        report is left then."""
        self._keeping.cancel()
        await asyncio.wait([self._keeping])
        await self._make(min(self._deadline_s, AFTER_SIGNAL_S) if by_signal else self._deadline_s)

    async def _keep(self) -> None:
        made_at = time.monotonic()
        while True:
            await asyncio.sleep(_POLL_S)
            if self._is_due or time.monotonic() - made_at >= self._every_s:
                self._is_due = False
                await self._make(self._deadline_s)
                made_at = time.monotonic()

    async def _make(self, deadline_s: float) -> None:
        """Makes one report. Whatever goes wrong becomes a line in the log."""
        if self._hurried():
            return
        child: Child | None = None
        try:
            child = await spawn(self._command, self._log)
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, child.pid, _NICENESS)
            code = await self._wait(child, time.monotonic() + deadline_s)
            if code is None:
                reason = "the run ends" if self._hurried() else f"it took more than {deadline_s:.0f} s"
                self._note(f"no report: {reason}")
            elif code:
                self._note(f"no report: its process {ended(code)}")
        except OSError as error:  # no memory for a process, no disk for its log
            self._note(f"no report: {error}")
        finally:
            if child is not None:
                child.kill_tree()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_KILL_S):
                        await child.wait()

    async def _wait(self, child: Child, until: float) -> int | None:
        """Returns the exit code, or None if the process still runs at its deadline, or the run hurries."""
        waiting = asyncio.create_task(child.wait())
        while time.monotonic() < until and not self._hurried():
            done, _ = await asyncio.wait([waiting], timeout=_POLL_S)
            if done:
                return waiting.result()
        waiting.cancel()
        return None

    def _note(self, text: str) -> None:
        """Adds a line to the log, if the log can be written."""
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
