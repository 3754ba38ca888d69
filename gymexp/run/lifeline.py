"""No orphans: a process that dies when its parent does, whatever ended the parent.

As a library: `die_with_parent()` first thing in a process of ours. As a program, for commands that are not ours:
`python lifeline.py COMMAND …` arranges it and becomes COMMAND.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """Have the kernel send SIGKILL to this process when its parent ends (Linux); elsewhere a thread watches for it.

    The Linux signal follows the parent's *thread* that started us, so parents must start children from a thread that
    lives as long as they do. SIGKILL reaches stopped processes too.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        return
    threading.Thread(target=_exit_when_orphaned, args=(parent,), daemon=True).start()


def _exit_when_orphaned(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
