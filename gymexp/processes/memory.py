"""The memory that this process and its children may still use."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


def memory_mb() -> tuple[float, float]:
    """Returns (free, total) in MB: the machine's, or less where a cgroup limits this process (a container, a
    Slurm job)."""
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    for group in _own_groups():
        try:
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
        except (OSError, ValueError):  # there is no limit ("max"), or no such controller
            continue
        free, total = min(free, limit - used), min(total, limit)
    return free / 2**20, total / 2**20


def _own_groups() -> list[Path]:
    """Returns the directories of this process's cgroup (version 2) and of those above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    names = [line.split(":", 2)[2].lstrip("/") for line in lines if line.startswith("0::")]
    return [group for name in names for group in (_CGROUPS / name, *(_CGROUPS / name).parents)][:16]
