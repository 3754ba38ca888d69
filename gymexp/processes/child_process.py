"""A child process whose output is read line by line, and that never outlives its block or this process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from gymexp.processes import parent_watch

_NUM_LAST_LINES = 15
_READ_TIMEOUT_S = 5.0  # a process that the child started may keep the pipe open


@contextlib.contextmanager
def child_process(
    command: Sequence[str], environ: Mapping[str, str], on_line: Callable[[str], object] | None = None
) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """Yields a child process in a process group of its own, and a function that returns its last lines of
    output, indented. The group is killed when the block is left, or when this process ends.

    on_line: called with each line of stdout and stderr, in a thread.
    """
    child = subprocess.Popen(
        [sys.executable, parent_watch.__file__, str(os.getpid()), *command],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)

    def follow() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line.rstrip())
            if on_line:
                on_line(line.rstrip())

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()

    def last_lines() -> str:
        reader.join(_READ_TIMEOUT_S)
        return "\n".join(f"  {line}" for line in lines if line)

    try:
        yield child, last_lines
        reader.join(_READ_TIMEOUT_S)
    finally:
        # The process group outlives the child if a process that the child started still runs.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
