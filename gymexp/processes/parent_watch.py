"""Makes a process end when its parent ends, whatever ended the parent, so that a run leaves no orphans.

As a library: gymexp's own processes call `die_with_parent()` first. As a program, for other commands:
`parent_watch.py PARENT COMMAND …` makes the same request and then executes COMMAND in its own place.
`parent_watch.py PARENT --reap COMMAND …` stays the parent of COMMAND. When its own parent ends, or on
SIGTERM, it ends COMMAND and everything that COMMAND started, daemons included (Linux). PARENT is the process
id of the starter, which may have ended already.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
_REAP_GRACE_S = 10.0


def die_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Asks the kernel to send a signal to this process when its parent ends (Linux); else a thread watches.

    Linux sends the signal at the end of the *thread* that started this process, so a parent must start its
    children from a thread that lives as long as the parent. SIGKILL ends stopped processes too.

    parent: the parent's process id, needed if the parent may have ended before this call; then this process
    exits with code 1 (Linux). None: the current parent.
    """
    parent = parent or os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)
        return
    threading.Thread(target=_signal_when_orphaned, args=(parent, number), daemon=True).start()


def _signal_when_orphaned(parent: int, number: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), number)


def _descendants(pid: int) -> list[int]:
    """Returns the ids of all descendants of a process, from /proc; empty if the system is not Linux."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc") if sys.platform == "linux" else ():
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as file:
                children.setdefault(int(file.read().rsplit(")", 1)[1].split()[1]), []).append(int(entry))
    descendants, unvisited = [], [pid]
    while unvisited:
        below = children.get(unvisited.pop(), [])
        descendants += below
        unvisited += below
    return descendants


def _reap(parent: int, command: list[str]) -> int:
    """Runs `command` below a reaper, which on SIGTERM ends all of its descendants; returns the exit code.

    The reaper is a child of the process that the starter knows, because SIGKILL may end that one: asyncio's
    loop sends SIGKILL to the processes that it has started when it is closed.
    """
    front = os.getpid()
    reaper = os.fork()
    if not reaper:
        _end_as(_run_to_the_end(front, command))

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(reaper, number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent=parent)
    return os.waitstatus_to_exitcode(os.waitpid(reaper, 0)[1])


def _run_to_the_end(parent: int, command: list[str]) -> int:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(signal.SIGTERM, parent)
    own = os.getpid()

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if sys.platform == "linux":
            die_with_parent(parent=own)

    child = subprocess.Popen(command, preexec_fn=prepare, close_fds=False)
    while child.poll() is None and not terminated.wait(0.1):
        pass
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_REAP_GRACE_S)
    while below := _descendants(os.getpid()):
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)
    code = child.returncode
    return 1 if code is None else code


def _end_as(code: int) -> None:
    """Ends this process as COMMAND ended: with its exit code, or by the signal that a negative code names."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # only COMMAND's core dump is useful
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    starter = int(sys.argv[1])
    # SIGUSR2, Slurm's warning, is for the controller alone; COMMAND inherits that it is ignored.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.argv[2] == "--reap":
        _end_as(_reap(starter, sys.argv[3:]))
    die_with_parent(parent=starter)
    os.execvp(sys.argv[2], sys.argv[2:])
