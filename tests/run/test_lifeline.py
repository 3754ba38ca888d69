"""No orphans, whatever ends the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gymexp.run import lifeline

PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, {lifeline!r}, str(os.getpid()), *{arguments!r}])
print(child.pid, flush=True)
time.sleep(60)
"""
# A daemon as Ray starts them: a session of its own, and its parent gone.
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
os.wait()
time.sleep(60)
"""


def start(arguments: list[str]) -> tuple[subprocess.Popen[str], int]:
    code = PARENT.format(lifeline=lifeline.__file__, arguments=arguments)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(pids: list[int], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if all(gone(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
@pytest.mark.parametrize("stopped", [False, True])
def test_a_child_dies_with_a_killed_parent_even_when_it_is_stopped(stopped):
    parent, child = start(["sleep", "60"])
    if stopped:
        until = time.monotonic() + 20
        while psutil.Process(child).name() != "sleep" and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(child, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    assert wait_gone([child], 20)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_the_reaper_ends_daemons_too(tmp_path: Path):
    parent, reaper = start(["--reap", sys.executable, "-c", DAEMON])
    until = time.monotonic() + 10
    below: list[int] = []
    while len(below) < 2 and time.monotonic() < until:
        below = lifeline._descendants(reaper)
        time.sleep(0.05)
    assert len(below) >= 2, "command and daemon"
    parent.kill()
    parent.wait()
    assert wait_gone([reaper, *below], 30)
