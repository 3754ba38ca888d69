"""Checkpoints that are whole or not there: a manifest is written last, and only what it vouches for is
resumed from."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import fmean

from gymexp.config import CheckpointConfig
from gymexp.errors import RunDirectoryError

log = logging.getLogger(__name__)
_MANIFEST = "complete.json"
_CONDEMNED = "deleting-"  # no checkpoint by its name, so that a deletion that is cut short leaves none


class CheckpointError(RunDirectoryError):
    """A checkpoint could not be written; earlier ones are untouched."""


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[-1])


def seal(checkpoint: Path) -> None:
    """Vouch for a checkpoint: every file with its size, on disk before the manifest is, and the manifest
    before an older checkpoint is deleted for it."""
    inside = sorted(checkpoint.rglob("*"))
    sizes = {}
    for path in (p for p in inside if p.is_file() and p.name != _MANIFEST):
        _sync(path)
        sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
    for path in (*(p for p in inside if p.is_dir()), checkpoint, checkpoint.parent):
        _sync(path)
    part = checkpoint / f"{_MANIFEST}.part"
    part.write_text(json.dumps(sizes, indent=1))
    _sync(part)
    part.replace(checkpoint / _MANIFEST)
    _sync(checkpoint)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def outdated(steps: Collection[int], scores: Mapping[int, float], policy: CheckpointConfig) -> set[int]:
    """Which of `steps`, those of all whole checkpoints, the policy keeps no longer. Pure.

    scores: held-out reward by step; a step without one is no candidate for the best. Of equals the
    newer stays.
    """
    if policy.keep_last is None:
        return set()
    newest = sorted(steps, reverse=True)
    kept = set(newest[: max(policy.keep_last, 1)])
    kept.update(best(steps, scores)[: policy.keep_best])
    if policy.keep_every is not None:
        kept.update(step for step in steps if step % policy.keep_every == 0)
    return set(steps) - kept


def best(steps: Collection[int], scores: Mapping[int, float]) -> list[int]:
    """The steps that have a score, from the highest; of equals the newer first."""
    return sorted((step for step in steps if step in scores), key=lambda s: (scores[s], s), reverse=True)


def read_scores(metrics: Path, envs: Collection[str]) -> dict[int, float]:
    """Held-out reward by step, the mean over `envs`, from metrics.jsonl; without the evaluations in which an
    environment's rollouts all failed."""
    scores = {}
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        entry = json.loads(line)
        rewards = [entry.get(f"eval_{env}/reward") for env in envs]
        if None not in rewards:
            scores[entry["step"]] = fmean(rewards)
    return scores


def prune(checkpoints: Path, policy: CheckpointConfig, scores: Mapping[int, float]) -> None:
    """Delete what the policy keeps no longer, and what was cut short while it was written or deleted, once a
    newer checkpoint is whole. With `keep_best`, the link `best` says which one that is.

    What cannot be deleted is warned of, and tried again the next time.
    """
    found = {step_of(path): path for path in checkpoints.glob("checkpoint-*") if path.is_dir()}
    standing = {step for step, path in found.items() if whole(path)}
    unwanted = outdated(standing, scores, policy)
    # One whose manifest is there but does not fit was changed after it was whole: not ours to delete.
    unwanted.update(
        step
        for step, path in found.items()
        if step < max(standing, default=0) and not (path / _MANIFEST).exists()
    )
    if policy.keep_best and (ranked := best(standing - unwanted, scores)):
        link = checkpoints / "best.part"
        link.unlink(missing_ok=True)
        link.symlink_to(found[ranked[0]].name)
        link.replace(checkpoints / "best")
    try:
        for step in sorted(unwanted):
            found[step].rename(checkpoints / f"{_CONDEMNED}{step}")
        for path in checkpoints.glob(f"{_CONDEMNED}*"):
            shutil.rmtree(path)
    except OSError as error:
        log.warning("an old checkpoint could not be deleted: %s", error)
