"""No orphans, whatever ends the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from gymexp.processes import parent_watch

PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, {script!r}, str(os.getpid()), *{arguments!r}])
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
    code = PARENT.format(script=parent_watch.__file__, arguments=arguments)
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


def all_below(front: int) -> list[int]:
    """The reaper, its command and the command's daemon, once they run."""
    until = time.monotonic() + 10
    below: list[int] = []
    while len(below) < 3 and time.monotonic() < until:
        below = parent_watch._descendants(front)
        time.sleep(0.05)
    assert len(below) >= 3
    return below


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
@pytest.mark.parametrize("killed", ["parent", "front"])
def test_the_reaper_ends_daemons_too_whoever_above_it_was_killed(killed):
    parent, front = start(["--reap", sys.executable, "-c", DAEMON])
    below = all_below(front)
    os.kill(parent.pid if killed == "parent" else front, signal.SIGKILL)
    assert wait_gone([front, *below], 30)
    parent.kill()
    parent.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_command_outlives_no_killed_reaper():
    parent, front = start(["--reap", "sleep", "60"])
    until = time.monotonic() + 10
    while len(below := parent_watch._descendants(front)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(below[0], signal.SIGKILL)
    assert wait_gone([front, *below], 10)
    parent.kill()
    parent.wait()


@pytest.mark.parametrize(
    ("command", "code"),
    [("exit 3", 3), ("kill -9 $$", -signal.SIGKILL), ("kill -ABRT $$", -signal.SIGABRT)],
)
def test_the_starter_sees_how_a_reaped_command_ended(command, code):
    words = [sys.executable, "-S", parent_watch.__file__, str(os.getpid()), "--reap", "sh", "-c", command]
    assert subprocess.run(words, timeout=30).returncode == code


def test_a_reaped_command_that_is_asked_to_end_gets_an_interrupt():
    code = "import time\ntry:\n    print('up', flush=True)\n    time.sleep(60)\n"
    code += "except KeyboardInterrupt: raise SystemExit(5)"
    words = [
        sys.executable,
        "-S",
        parent_watch.__file__,
        str(os.getpid()),
        "--reap",
        sys.executable,
        "-c",
        code,
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    process.terminate()
    assert process.wait(30) == 5
