"""Checkpoints that are whole or not there: a manifest is written last, and only what it vouches for is
resumed from."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

from gymexp.errors import RunDirectoryError
from gymexp.run.directory import replace_file

log = logging.getLogger(__name__)
_MANIFEST = "complete.json"


class CheckpointError(RunDirectoryError):
    """A checkpoint could not be written; earlier ones are untouched."""


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[-1])


def seal(checkpoint: Path) -> None:
    """Vouch for a checkpoint: every file with its size, on disk before the manifest is."""
    sizes = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != _MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
    replace_file(checkpoint / _MANIFEST, json.dumps(sizes, indent=1))


def whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / _MANIFEST).read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def latest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint, with a warning for each newer one that is not. None if there never was
    one.

    Raises RunDirectoryError when there are checkpoints and none is whole.
    """
    found = sorted((p for p in checkpoints.glob("checkpoint-*") if p.is_dir()), key=step_of, reverse=True)
    for checkpoint in found:
        if whole(checkpoint):
            return checkpoint
        log.warning("%s is cut short: going back to the one before it", checkpoint)
    if found:
        raise RunDirectoryError(
            f"no checkpoint in {checkpoints} is whole: {', '.join(p.name for p in found)}"
        )
    return None


def newest_step(checkpoints: Path) -> int | None:
    """The step of the newest whole checkpoint; None without one."""
    return max((step_of(p) for p in checkpoints.glob("checkpoint-*") if whole(p)), default=None)


@contextlib.contextmanager
def writing(checkpoint: Path):
    """Seal what the block writes; on any failure remove it and say what is left."""
    try:
        yield
        seal(checkpoint)
    except Exception as error:
        shutil.rmtree(checkpoint, ignore_errors=True)
        free = shutil.disk_usage(checkpoint.parent).free / 2**20
        before = [p.name for p in sorted(checkpoint.parent.glob("checkpoint-*"), key=step_of) if whole(p)]
        raise CheckpointError(
            f"could not write {checkpoint}: {type(error).__name__}: {error} ({free:.0f} MB free there). "
            + (f"The run can go on from {before[-1]}" if before else "There is no earlier checkpoint")
            + ": make room, then resume the run directory"
        ) from error
