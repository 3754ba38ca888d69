"""What a check found; and how none of them can hang the doctor: every command and check has a deadline."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from gymexp.config.schema import RunConfig
from gymexp.errors import GymexpError

ANSWER_S = 10.0


@dataclass(frozen=True)
class Finding:
    """level: ok, warn or fail. fix: what to do about it, empty where nothing is to be done."""

    level: str
    what: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Subject:
    """What is checked: this machine, for the runs of `config`. launcher: the option of that group."""

    config: RunConfig
    launcher: str = "local"


class Check(NamedTuple):
    """One thing to look at. look: gives findings. deadline_s: then the check counts as hanging."""

    name: str
    look: Callable[[Subject], Iterable[Finding]]
    deadline_s: float


class Answer(NamedTuple):
    """Of a command. code: its exit code; None: it was not there, or had not ended at the deadline."""

    code: int | None
    out: str
    error: str


def ask(*command: str, timeout_s: float = ANSWER_S) -> Answer:
    """Run a command and what it starts for at most `timeout_s`.

    Output goes to files: a pipe stays open as long as any child of the command, perhaps for ever. One that
    cannot even be killed, as on a file system that hangs, is left behind.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except OSError as error:
            return Answer(None, "", f"{command[0]}: {error.strerror}")
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            return Answer(None, "", f"{command[0]} gave no answer within {timeout_s:g} s")
        out.seek(0)
        err.seek(0)
        return Answer(code, out.read().decode(errors="replace"), err.read().decode(errors="replace").strip())


def run_checks(checks: Iterable[Check], subject: Subject) -> list[Finding]:
    """All at once; the findings in the order of the checks. One that does not end in time is a failure."""
    checks = list(checks)
    done: queue.SimpleQueue[tuple[int, list[Finding]]] = queue.SimpleQueue()

    def work(number: int, check: Check) -> None:
        try:
            found = list(check.look(subject))
        except GymexpError as error:
            found = [Finding("fail", check.name, str(error))]
        except Exception as error:  # the others are still to be heard
            found = [Finding("fail", check.name, f"the check broke: {type(error).__name__}: {error}")]
        done.put((number, found))

    began = time.monotonic()
    for number, check in enumerate(checks):
        threading.Thread(target=work, args=(number, check), daemon=True).start()
    results: dict[int, list[Finding]] = {}
    while left := [number for number in range(len(checks)) if number not in results]:
        next_end = began + min(checks[number].deadline_s for number in left)
        with contextlib.suppress(queue.Empty):
            number, found = done.get(timeout=max(0.0, next_end - time.monotonic()))
            results.setdefault(number, found)
            continue
        for number in left:
            name, _, deadline_s = checks[number]
            if time.monotonic() >= began + deadline_s:
                results[number] = [Finding("fail", name, f"no answer within {deadline_s:g} s")]
    return [finding for number in range(len(checks)) for finding in results[number]]
