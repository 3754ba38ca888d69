"""A trial of one directory's file system: python -m gymexp.doctor.disk_probe DIR prints the result as JSON.

The probe runs in its own process, as a network file system that hangs would hang the doctor too. It uses only
the standard library.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def probe(path: Path) -> dict[str, Any]:
    """Returns facts about `path`, or about its nearest existing parent directory if `path` does not exist.

    where: the directory that was probed. type: of its file system. free: bytes. inodes_free: None if the file
    system does not count inodes. error: what cannot be done in the directory, or None. write_s: seconds to
    write one small file to the disk.
    """
    directory = path.absolute()
    while not directory.is_dir():
        directory = directory.parent
    stat = os.statvfs(directory)
    facts: dict[str, Any] = {
        "where": str(directory),
        "type": _type_of(directory),
        "free": stat.f_bavail * stat.f_frsize,
        "inodes_free": stat.f_favail if stat.f_files else None,
        "error": None,
        "write_s": None,
    }
    trial_file = directory / f".gymexp-doctor-{os.getpid()}"
    action = "written to"
    began = time.monotonic()
    try:
        with trial_file.open("w") as file:
            file.write("gymexp")
            file.flush()
            os.fsync(file.fileno())
            facts["write_s"] = time.monotonic() - began
            action = "locked in (flock)"
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        facts["error"] = f"cannot be {action}: {error.strerror}"
    finally:
        trial_file.unlink(missing_ok=True)
    return facts


def _type_of(directory: Path) -> str:
    """Returns a directory's file system type as the kernel names it, e.g. ext4, nfs4, lustre.

    The type is that of the deepest mount point above the directory, and of the last mount made at that point.
    Returns "?" if /proc/mounts cannot be read.
    """
    deepest, kind = "", "?"
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return kind
    for line in mounts:
        point = line.split()[1].encode().decode("unicode_escape")
        if len(point) >= len(deepest) and directory.resolve().is_relative_to(point):
            deepest, kind = point, line.split()[2]
    return kind


if __name__ == "__main__":
    print(json.dumps(probe(Path(sys.argv[1]))))
