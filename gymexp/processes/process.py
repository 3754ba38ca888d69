"""Starts a process of a run, ends it with all of its descendants, and describes how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from gymexp.processes import parent_watch
from gymexp.processes.launcher_variables import without_launchers


class Running(Protocol):
    """A started process, on this node or another one."""

    @property
    def pid(self) -> int: ...

    @property
    def rss_mb(self) -> float:
        """Resident memory in MiB when it was last measured; 0 if it is unknown."""
        ...

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped the process (Linux's state T); False if that is unknown."""
        ...

    async def wait(self) -> int:
        """Waits for the end and returns the exit code, or the negative number of the signal that ended it.

        Raises ServiceError if the host of the process is gone.
        """
        ...

    def signal(self, number: int) -> None: ...

    def terminate(self) -> None:
        """Sends SIGTERM and notes the descendants.

        A later `kill_tree` ends these descendants, even if the process has ended before.
        """
        ...

    def kill_tree(self) -> None:
        """Sends SIGKILL to the process and its descendants."""
        ...


class LocalProcess:
    """A process of this machine, known by its id. It has no `wait`; the starter of the process waits."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._process = psutil.Process(pid)  # psutil tells it from a later process with the same id
        except psutil.NoSuchProcess:
            self._process = None
        self._tree: set[psutil.Process] = set()

    @property
    def rss_mb(self) -> float:
        with contextlib.suppress(psutil.Error):
            return self._process.memory_info().rss / 2**20 if self._process else 0.0
        return 0.0

    @property
    def is_stopped(self) -> bool:
        with contextlib.suppress(psutil.Error):
            return bool(self._process) and self._process.status() == psutil.STATUS_STOPPED
        return False

    def signal(self, number: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process:
                self._process.send_signal(number)

    def terminate(self) -> None:
        self._note_descendants()
        self.signal(signal.SIGTERM)

    def kill_tree(self) -> None:
        self._note_descendants()
        for process in self._tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _note_descendants(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process:
                self._tree |= {self._process, *self._process.children(recursive=True)}


class Child(LocalProcess):
    """A process that `spawn` started."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        super().__init__(process.pid)
        self._child = process

    async def wait(self) -> int:
        return await self._child.wait()


async def spawn(
    command: Sequence[str | os.PathLike[str]],
    log: Path,
    env: Mapping[str, str] | None = None,
    fds: Sequence[int] = (),
    cwd: Path | None = None,
    reap: bool = False,
) -> Child:
    """Starts a command in a session of its own. The command ends when this process ends.

    log: the file to which its output is appended. env: variables to add to this process's environment, from
    which other launchers' variables are removed. fds: file descriptors that the command inherits. reap: also
    end processes that outlive the command, as Ray's do.
    """
    with log.open("ab") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-S",
            parent_watch.__file__,
            str(os.getpid()),
            *(["--reap"] if reap else []),
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**without_launchers(), **(env or {})},
            pass_fds=fds,
            cwd=cwd,
            start_new_session=True,
        )
    return Child(process)


def ended(code: int) -> str:
    """Describes how a process ended. For SIGKILL, lack of memory is named as the cause if it is likely."""
    if code >= 0:
        return f"exited with code {code}"
    if -code == signal.SIGKILL and (kills := _oom_kills() - _OOM_KILLS_BEFORE) > 0:
        return (
            f"was ended by SIGKILL (out of memory: since the run began the kernel has ended {kills} "
            "processes for that; ask for more memory, on Slurm by launcher.mem, or use smaller batches or "
            "fewer replicas)"
        )
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _oom_kills() -> int:
    """Returns the number of out-of-memory kills since this machine's boot, jobs and containers included.

    Source: proc_vmstat(5), oom_kill. Returns 0 if the system is not Linux.
    """
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


_OOM_KILLS_BEFORE = _oom_kills()
