"""A process of a run: started, ended with all that it started, and how it ended, in words."""

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

from gymexp.processes import lifeline
from gymexp.processes.environment import without_launchers


class Running(Protocol):
    """A started process, on whichever node."""

    @property
    def pid(self) -> int: ...

    @property
    def rss_mb(self) -> float:
        """As last seen; 0 where it is not known."""
        ...

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it (Linux's state T); False where it is not known."""
        ...

    async def wait(self) -> int:
        """Its exit code; negative: a signal's number. Raises ServiceError if what runs it is gone."""
        ...

    def signal(self, number: int) -> None: ...

    def terminate(self) -> None:
        """SIGTERM. What it has started by now is ended by a later `kill_tree`, even where it went before."""
        ...

    def kill_tree(self) -> None:
        """SIGKILL to the process and to what it started."""
        ...


class LocalProcess:
    """A process of this machine, by its id; `wait` is its starter's."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._process = psutil.Process(pid)  # which knows it from a later one of the same id
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
        self._look()
        self.signal(signal.SIGTERM)

    def kill_tree(self) -> None:
        self._look()
        for process in self._tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process:
                self._tree |= {self._process, *self._process.children(recursive=True)}


class Child(LocalProcess):
    """A process started by `spawn`."""

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
    """Start a command in a session of its own, that ends with this process; its output is appended to `log`.

    reap: the command starts processes that may outlive it (Ray's do); they end with it.
    """
    with log.open("ab") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-S",
            lifeline.__file__,
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
    """How a process ended, in words; of SIGKILL also whether it may have been for want of memory."""
    if code >= 0:
        return f"exited with code {code}"
    if -code == signal.SIGKILL and (kills := _oom_kills() - _OOM_KILLS_BEFORE) > 0:
        return (
            f"was ended by SIGKILL (out of memory: since the run began the kernel has ended {kills} for "
            "that; ask for more, on Slurm by launcher.mem, or have smaller batches or fewer replicas)"
        )
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _oom_kills() -> int:
    """Of this machine since it started, in its jobs and containers too (proc_vmstat(5), oom_kill)."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


_OOM_KILLS_BEFORE = _oom_kills()
