"""Calls of uv, which makes NeMo Gym's venvs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from gymexp.errors import ServiceError

_Argument = str | os.PathLike[str]


def uv(*arguments: _Argument, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs uv with `given` as its input, and returns the ended process."""
    from uv import find_uv_bin

    command = [find_uv_bin(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=given)


def install(python: Path, *packages: _Argument) -> None:
    """Installs packages for `python`. Raises ServiceError if uv fails."""
    check(uv("pip", "install", "--quiet", "--python", python, *packages), f"install {packages[0]}")


def check(result: subprocess.CompletedProcess[str], action: str) -> None:
    """Raises ServiceError with uv's own error if it failed."""
    if result.returncode:
        raise ServiceError(f"uv could not {action}:\n{result.stderr.strip()}")
