"""Runs a module of gymexp in a process of its own, and reads its answer: JSON, in the last line that it
prints.

The commands call the modules that import transformers or TRL in this way, and so need not import these
libraries.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gymexp.errors import ConfigError
from gymexp.processes.failure_reason import last_exception
from gymexp.processes.launcher_variables import without_launchers
from gymexp.processes.process import ended

_LAST_CHARACTERS = 2000  # of stderr, for an error without an exception


def call_module(arguments: Sequence[str | Path], task: str, timeout_s: float, stdin: Any = None) -> Any:
    """Returns the answer of `python -m <arguments>`. stdin: a value that the module reads as JSON.

    Raises ConfigError, whose message begins with `task`, if the module fails or takes longer than timeout_s.
    """
    try:
        process = subprocess.run(
            [sys.executable, "-m", *arguments],
            input=json.dumps(stdin),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=without_launchers(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{task} took more than {timeout_s:.0f} s") from None
    if process.returncode:
        reason = last_exception(process.stderr) or process.stderr.strip()[-_LAST_CHARACTERS:]
        raise ConfigError(f"{task} failed: {reason or f'the process {ended(process.returncode)}'}")
    return json.loads(process.stdout.splitlines()[-1])


def call_module_once(arguments: Sequence[str | Path], task: str, timeout_s: float, answer_file: Path) -> Any:
    """Returns the answer of `python -m <arguments>`: from `answer_file` if an earlier call wrote it, else
    from a new process, as `call_module` does.

    Two processes may call at once, as the file is replaced whole. If the file cannot be written, the next
    call runs the module again.
    """
    try:
        return json.loads(answer_file.read_bytes())
    except (OSError, ValueError):
        pass
    answer = call_module(arguments, task, timeout_s)
    with contextlib.suppress(OSError):
        answer_file.parent.mkdir(parents=True, exist_ok=True)
        part = answer_file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(answer))
        part.replace(answer_file)
    return answer
