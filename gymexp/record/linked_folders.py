"""A folder of a run that lies on another disk, with a symbolic link in its place.

A run has a random word in its directory and in each folder that it makes: `run_id`. A reader follows a link
out of a run directory only to a folder with the word of this run. So a folder that the run's user has moved
is read like any other. A stranger's run directory cannot make a command show or publish a folder of the
reader's, as the stranger does not know the word in that folder.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterable
from pathlib import Path

from gymexp.errors import RunDirectoryError
from gymexp.files import replace_file

RUN_ID = "run_id"
_MAX_ID = 200  # bytes
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def mark(run: Path, folders: Iterable[Path]) -> None:
    """Writes the run's word into its directory and into these folders of it, where they have none. A linked
    folder gets it only while it is empty: what is in it may be of another run."""
    if not (run / RUN_ID).exists():
        replace_file(run / RUN_ID, f"{secrets.token_hex(16)}\n")
    for folder in folders:
        is_ours = not folder.is_symlink() or not any(folder.iterdir())
        if folder.is_dir() and is_ours and not (folder / RUN_ID).exists():
            replace_file(folder / RUN_ID, (run / RUN_ID).read_text())


def is_own_link(run: Path, folder: Path) -> bool:
    """Returns whether a path below a run directory is a link to a folder of this run."""
    return folder.is_symlink() and (word := _read_id(run)) != b"" and word == _read_id(folder)


def own_links(run: Path, path: Path) -> list[Path]:
    """Returns the real places of the folders of this run that lie behind links on the way from the run
    directory to `path`."""
    return [folder.resolve() for folder in _between(run, path) if is_own_link(run, folder)]


def why_refused(run: Path, path: Path) -> str:
    """Returns what to do about a path below a run directory that a link leads out of it."""
    folder = next((folder for folder in _between(run, path) if folder.is_symlink()), None)
    if folder is None:
        return "is a link that leads out of it: replace the link by the file"
    real = folder.resolve()
    source, target = shlex.quote(str(run / RUN_ID)), shlex.quote(f"{real}/")
    say_so = f"cp {source} {target}"
    if not _read_id(run):
        say_so = f"write the same word into {run / RUN_ID} and into {real / RUN_ID}"
    return (
        f"{folder.relative_to(run)} is a link that leads out of it, to {real}: replace the link by the "
        f"folder; or, only if that folder is this run's own: {say_so}"
    )


def check_there(run: Path, folders: Iterable[Path]) -> None:
    """Raises RunDirectoryError if a folder of the run, or a checkpoint, is a link that leads nowhere. With
    its disk missing, a run that is resumed would begin anew."""
    for folder in folders:
        inside = folder.glob("checkpoint-*") if folder.is_dir() else ()
        for path in (folder, *(path for path in inside if _CHECKPOINT.fullmatch(path.name))):
            if path.is_symlink() and not path.is_dir():
                raise RunDirectoryError(
                    f"{path} must be a folder, but is a link to {os.readlink(path)}, which is none: mount "
                    "the disk that has it, or put the folder back"
                )


def _between(run: Path, path: Path) -> list[Path]:
    """Returns the folders between a run directory and a path below it, outermost first."""
    parents = [*path.parents]
    return parents[: parents.index(run)][::-1] if run in parents else []


def _read_id(folder: Path) -> bytes:
    """Returns the word in a folder; empty if it has none. The file must be a plain one: a link could lead to
    the word of another run."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(folder / RUN_ID, flags)
    except OSError:
        return b""
    try:
        is_plain = stat.S_ISREG(os.fstat(descriptor).st_mode)
        return os.read(descriptor, _MAX_ID).strip() if is_plain else b""
    finally:
        os.close(descriptor)
