"""One directory, tried out: python -m gymexp.doctor.disk_probe DIR prints JSON.

A process of its own, of the standard library alone: a network file system that hangs takes it along, and
not the one that asked.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def probe(wanted: Path) -> dict[str, Any]:
    """Of `wanted`, or of the nearest directory above that exists: where, type (of its file system), free
    (bytes), inodes_free (None where it does not count them), error (what cannot be done there, or None) and
    write_s (one small file, to the disk)."""
    where = wanted.absolute()
    while not where.is_dir():
        where = where.parent
    room = os.statvfs(where)
    found: dict[str, Any] = {
        "where": str(where),
        "type": _type_of(where),
        "free": room.f_bavail * room.f_frsize,
        "inodes_free": room.f_favail if room.f_files else None,
        "error": None,
        "write_s": None,
    }
    tried = where / f".gymexp-doctor-{os.getpid()}"
    doing = "written to"
    began = time.monotonic()
    try:
        with tried.open("w") as file:
            file.write("gymexp")
            file.flush()
            os.fsync(file.fileno())
            found["write_s"] = time.monotonic() - began
            doing = "locked in (flock)"
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        found["error"] = f"cannot be {doing}: {error.strerror}"
    finally:
        tried.unlink(missing_ok=True)
    return found


def _type_of(where: Path) -> str:
    """As the kernel names it, e.g. ext4, nfs4, lustre: of the deepest mount above, the last made there."""
    best, kind = "", "?"
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return kind
    for line in mounts:
        point = line.split()[1].encode().decode("unicode_escape")
        if len(point) >= len(best) and where.resolve().is_relative_to(point):
            best, kind = point, line.split()[2]
    return kind


if __name__ == "__main__":
    print(json.dumps(probe(Path(sys.argv[1]))))
