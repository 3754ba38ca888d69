"""Checkpoints that are whole or not there: a manifest is written last, and only what it vouches for is
resumed from.

complete.json: {file: [bytes, xxh3_128 of its content]}. Sizes are looked at where that is enough; the content
is read before a run goes on from it. Runs made before hashes were kept have {file: bytes}.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from statistics import fmean

import xxhash

from gymexp.config.schema import CheckpointConfig
from gymexp.errors import RunDirectoryError
from gymexp.files import read_lines
from gymexp.record.metric_names import name_of

log = logging.getLogger(__name__)
_MANIFEST = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# Names of no checkpoint: a deletion that is cut short leaves none, and what is damaged is in nobody's way.
_CONDEMNED, _DAMAGED = "deleting-", "damaged-"
_CHUNK_BYTES = 1 << 22


class CheckpointError(RunDirectoryError):
    """A checkpoint could not be written; earlier ones are untouched."""


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rsplit("-", 1)[-1])


def all_of(checkpoints: Path) -> dict[int, Path]:
    """By step, from the oldest. What has another name than a checkpoint's is none, and left alone."""
    found = {p: _NAME.fullmatch(p.name) for p in checkpoints.glob("checkpoint-*") if p.is_dir()}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def seal(checkpoint: Path) -> None:
    """Vouch for a checkpoint: every file with its size and hash, on disk before the manifest is, and the
    manifest before an older checkpoint is deleted for it."""
    inside = sorted(checkpoint.rglob("*"))
    files = {}
    for path in (p for p in inside if p.is_file() and p.name != _MANIFEST):
        _sync(path)
        files[str(path.relative_to(checkpoint))] = [path.stat().st_size, _hash(path)]
    for path in (*(p for p in inside if p.is_dir()), checkpoint, checkpoint.parent):
        _sync(path)
    part = checkpoint / f"{_MANIFEST}.part"
    part.write_text(json.dumps(files, indent=1))
    _sync(part)
    part.replace(checkpoint / _MANIFEST)
    _sync(checkpoint)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def whole(checkpoint: Path) -> bool:
    """Whether every file is there in its size."""
    return not damage(checkpoint, read=False)


def damage(checkpoint: Path, read: bool = True) -> str:
    """What is not as it was sealed; empty of a whole checkpoint. read: look at the content too."""
    try:
        files = json.loads((checkpoint / _MANIFEST).read_bytes())
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError):
        return f"its {_MANIFEST} is damaged"
    try:
        for name, said in files.items():
            size, digest = said if isinstance(said, list) else (said, None)
            path = checkpoint / name
            if not path.is_file():
                return f"its {name} is missing"
            if (now := path.stat().st_size) != size:
                return f"its {name} has {now} bytes of {size}"
            if read and digest is not None and _hash(path) != digest:
                return f"its {name} is damaged"
    except OSError as error:
        return f"its {error.filename and Path(error.filename).name} cannot be read: {error.strerror}"
    except (AttributeError, ValueError):
        return f"its {_MANIFEST} is damaged"
    return ""


def latest(checkpoints: Path, say: Callable[[str], None] = log.warning) -> Path | None:
    """The newest checkpoint of which every byte is as it was written. None if none was ever finished.

    Says of each newer one what is wrong with it, and renames it: the run is to write that step's again.
    Raises RunDirectoryError where checkpoints are damaged and none is whole: these keep their names.
    """
    wrong: dict[Path, str] = {}
    for checkpoint in reversed(all_of(checkpoints).values()):
        if not (reason := damage(checkpoint)):
            for bad, why in wrong.items():
                _put_aside(bad)
                say(f"{bad.name} is not whole, {why}: going back to {checkpoint.name}")
            return checkpoint
        wrong[checkpoint] = reason
    if any((path / _MANIFEST).exists() for path in wrong):
        reasons = "; ".join(f"{path.name}: {why}" for path, why in wrong.items())
        raise RunDirectoryError(
            f"no checkpoint in {checkpoints} is whole ({reasons}): put back a copy of one, or begin anew in "
            "another output_dir"
        )
    for unfinished in wrong:
        _put_aside(unfinished)
        say(f"{unfinished.name} was not finished, and there is none before it: training begins anew")
    return None


def _put_aside(checkpoint: Path) -> None:
    """Out of the way of the one that the run will write: for the next `prune` if it was never finished."""
    prefix = _DAMAGED if (checkpoint / _MANIFEST).exists() else _CONDEMNED
    number = 1
    while (target := checkpoint.with_name(f"{prefix}{checkpoint.name}.{number}")).exists():
        number += 1
    checkpoint.rename(target)


def newest_step(checkpoints: Path) -> int | None:
    """The step of the newest whole checkpoint; None without one."""
    return max(_standing(all_of(checkpoints).items()), default=None)


def _standing(found: Iterable[tuple[int, Path]]) -> set[int]:
    return {step for step, path in found if whole(path)}


@contextlib.contextmanager
def writing(checkpoint: Path):
    """Seal what the block writes; on any failure remove it and say what is left."""
    try:
        yield
        seal(checkpoint)
    except Exception as error:
        shutil.rmtree(checkpoint, ignore_errors=True)
        if not checkpoint.parent.exists():
            raise  # there is no run directory to go on in
        free = shutil.disk_usage(checkpoint.parent).free / 2**20
        before = [path.name for path in all_of(checkpoint.parent).values() if whole(path)]
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
    for entry in read_lines(metrics):
        rewards = [entry.get(name_of(env, "reward", held_out=True)) for env in envs]
        known = [reward for reward in rewards if reward is not None]
        if len(known) == len(rewards):
            scores[entry["step"]] = fmean(known)
    return scores


def prune(checkpoints: Path, policy: CheckpointConfig, scores: Mapping[int, float]) -> None:
    """Delete what the policy keeps no longer, and what was cut short while it was written or deleted, once a
    newer checkpoint is whole. With `keep_best`, the link `best` says which one that is.

    What cannot be deleted is warned of, and tried again the next time.
    """
    found = all_of(checkpoints)
    standing = _standing(found.items())
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
