"""The findings of the doctor's checks, and the runner of the checks, with a deadline for every command and
check, so that none of them can hang the doctor."""

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

COMMAND_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Finding:
    """One result of a check. level: ok, warn or fail. name: the check's. fix: what the user can do, empty if
    nothing is wrong."""

    level: str
    name: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Subject:
    """The run that this machine is checked for. launcher: the chosen option of the group `launcher`."""

    config: RunConfig
    launcher: str = "local"


class Check(NamedTuple):
    """One check. look: yields its findings. deadline_s: seconds until the check counts as hanging."""

    name: str
    look: Callable[[Subject], Iterable[Finding]]
    deadline_s: float


class CommandResult(NamedTuple):
    """A command's output. code: its exit code, None if it is not installed or had not ended in time."""

    code: int | None
    out: str
    error: str


def run_command(*command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> CommandResult:
    """Run a command, and end it and its children after `timeout_s` seconds.

    Output goes to files, as a pipe would stay open as long as any child of the command, perhaps for ever. A
    command that cannot even be killed, as on a file system that hangs, is left behind.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except OSError as error:
            return CommandResult(None, "", f"{command[0]}: {error.strerror}")
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            return CommandResult(None, "", f"{command[0]} gave no answer within {timeout_s:g} s")
        out.seek(0)
        err.seek(0)
        output, errors = (file.read().decode(errors="replace") for file in (out, err))
        return CommandResult(code, output, errors.strip())


def run_checks(checks: Iterable[Check], subject: Subject) -> list[Finding]:
    """Run all checks at once. Returns their findings, in the order of the checks. A check that does not end
    before its deadline, or that raises an exception, is a finding of level fail."""
    checks = list(checks)
    done: queue.SimpleQueue[tuple[int, list[Finding]]] = queue.SimpleQueue()

    def work(number: int, check: Check) -> None:
        try:
            findings = list(check.look(subject))
        except GymexpError as error:
            findings = [Finding("fail", check.name, str(error))]
        except Exception as error:  # an error in one check must not hide the findings of the others
            text = f"the check broke: {type(error).__name__}: {error}"
            findings = [Finding("fail", check.name, text)]
        done.put((number, findings))

    began = time.monotonic()
    for number, check in enumerate(checks):
        threading.Thread(target=work, args=(number, check), daemon=True).start()
    results: dict[int, list[Finding]] = {}
    while left := [number for number in range(len(checks)) if number not in results]:
        next_end = began + min(checks[number].deadline_s for number in left)
        with contextlib.suppress(queue.Empty):
            number, findings = done.get(timeout=max(0.0, next_end - time.monotonic()))
            results.setdefault(number, findings)
            continue
        for number in left:
            name, _, deadline_s = checks[number]
            if time.monotonic() >= began + deadline_s:
                results[number] = [Finding("fail", name, f"no answer within {deadline_s:g} s")]
    return [finding for number in range(len(checks)) for finding in results[number]]
