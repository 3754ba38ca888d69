"""Stand-ins for a machine's commands: shell scripts at the front of PATH."""

from __future__ import annotations

from pathlib import Path

import pytest


def put(monkeypatch: pytest.MonkeyPatch, folder: Path, **scripts: str) -> None:
    """nvidia_smi="echo …" becomes the command nvidia-smi."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
