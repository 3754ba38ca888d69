"""No orphans: a process that dies when its parent does, whatever ended the parent.

As a library: `die_with_parent()` first thing in a process of ours. As a program, for commands that are not
ours: `lifeline.py PARENT COMMAND …` arranges it and becomes COMMAND; `lifeline.py PARENT --reap COMMAND …`
stays above COMMAND and, at its own parent's end or on SIGTERM, ends COMMAND and everything that it
started, daemons included (Linux). PARENT: the starter's process id, which may have ended already.
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
    """Have the kernel send a signal to this process when its parent ends (Linux); elsewhere a thread watches
    for it.

    parent: its process id, where it may have ended before this is called; None: whoever it is now.
    The Linux signal follows the parent's *thread* that started us, so parents must start children from a
    thread that lives as long as they do. SIGKILL reaches stopped processes too.
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
    """Process ids below `pid`, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc") if sys.platform == "linux" else ():
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as file:
                children.setdefault(int(file.read().rsplit(")", 1)[1].split()[1]), []).append(int(entry))
    found, open_ = [], [pid]
    while open_:
        below = children.get(open_.pop(), [])
        found += below
        open_ += below
    return found


def _reap(parent: int, command: list[str]) -> int:
    """Run `command` below a process that ends all of it when asked; returns its exit code.

    That process is not the one that the starter knows, which SIGKILL may end: asyncio's loop sends it, when
    it is closed, to what it has started.
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
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(signal.SIGTERM, parent)
    own = os.getpid()

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if sys.platform == "linux":
            die_with_parent(parent=own)

    child = subprocess.Popen(command, preexec_fn=prepare, close_fds=False)
    while child.poll() is None and not asked.wait(0.1):
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
    """End with an exit code, or by the signal that a negative one stands for: the starter is to see how
    COMMAND ended."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # COMMAND's core is of use, not this one's
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    starter = int(sys.argv[1])
    signal.signal(
        signal.SIGUSR2, signal.SIG_IGN
    )  # Slurm's warning is the controller's; COMMAND inherits this
    if sys.argv[2] == "--reap":
        _end_as(_reap(starter, sys.argv[3:]))
    die_with_parent(parent=starter)
    os.execvp(sys.argv[2], sys.argv[2:])
