"""Checkpoints with a manifest. The manifest is written last, and a run resumes only from a checkpoint whose
files match it.

complete.json: {file: [bytes, xxh3_128 of its content]}. Most checks compare sizes only; the content is read
before a run resumes from a checkpoint. Runs from before hashes were kept have {file: bytes}.
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
# A directory with one of these prefixes does not count as a checkpoint. So an interrupted deletion leaves no
# half checkpoint, and a damaged one does not block the step that is written again.
_DELETING, _DAMAGED = "deleting-", "damaged-"
_CHUNK_BYTES = 1 << 22


class CheckpointError(RunDirectoryError):
    """A checkpoint could not be written; earlier ones are untouched."""


def step_of(checkpoint: Path) -> int:
    """Returns the step in a checkpoint's name."""
    return int(checkpoint.name.rsplit("-", 1)[-1])


def all_of(checkpoints: Path) -> dict[int, Path]:
    """Returns the checkpoint directories by step, oldest first, whole or not. Other names are ignored."""
    matches = {p: _NAME.fullmatch(p.name) for p in checkpoints.glob("checkpoint-*") if p.is_dir()}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))


def seal(checkpoint: Path) -> None:
    """Writes the manifest of a finished checkpoint: the size and the hash of every file.

    Every file is synced to disk before the manifest, and the manifest before this function returns, so that
    no older checkpoint is deleted in favour of one that a power cut could still destroy.
    """
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
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def whole(checkpoint: Path) -> bool:
    """Returns whether a checkpoint has a manifest and every file has the size in it. Reads no content."""
    return not damage(checkpoint, read=False)


def damage(checkpoint: Path, read: bool = True) -> str:
    """Returns how a checkpoint differs from its manifest; empty if it is whole.

    read: also compare the hash of every file's content.
    """
    try:
        files = json.loads((checkpoint / _MANIFEST).read_bytes())
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError):
        return f"its {_MANIFEST} is damaged"
    try:
        for name, entry in files.items():
            size, digest = entry if isinstance(entry, list) else (entry, None)
            path = checkpoint / name
            if not path.is_file():
                return f"its {name} is missing"
            if (actual_size := path.stat().st_size) != size:
                return f"its {name} has {actual_size} bytes of {size}"
            if read and digest is not None and _hash(path) != digest:
                return f"its {name} is damaged"
    except OSError as error:
        return f"its {error.filename and Path(error.filename).name} cannot be read: {error.strerror}"
    except (AttributeError, ValueError):
        return f"its {_MANIFEST} is damaged"
    return ""


def latest(checkpoints: Path, say: Callable[[str], None] = log.warning) -> Path | None:
    """Returns the newest checkpoint in which every byte is as it was written; None if no checkpoint was ever
    finished.

    Newer checkpoints that are not whole are reported by `say` and renamed, because the run will write their
    steps again. Raises RunDirectoryError if a finished checkpoint is damaged and none is whole; the damaged
    ones keep their names.
    """
    broken: dict[Path, str] = {}
    for checkpoint in reversed(all_of(checkpoints).values()):
        if not (reason := damage(checkpoint)):
            for newer, newer_reason in broken.items():
                _put_aside(newer)
                say(f"{newer.name} is not whole, {newer_reason}: going back to {checkpoint.name}")
            return checkpoint
        broken[checkpoint] = reason
    if any((path / _MANIFEST).exists() for path in broken):
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in broken.items())
        raise RunDirectoryError(
            f"no checkpoint in {checkpoints} is whole ({reasons}): put back a copy of one, or begin anew in "
            "another output_dir"
        )
    for unfinished in broken:
        _put_aside(unfinished)
        say(f"{unfinished.name} was not finished, and there is none before it: training begins anew")
    return None


def _put_aside(checkpoint: Path) -> None:
    """Renames a broken checkpoint, so that the run can write its step again. If it was never finished, the
    next `prune` deletes it."""
    prefix = _DAMAGED if (checkpoint / _MANIFEST).exists() else _DELETING
    number = 1
    while (target := checkpoint.with_name(f"{prefix}{checkpoint.name}.{number}")).exists():
        number += 1
    checkpoint.rename(target)


def newest_step(checkpoints: Path) -> int | None:
    """Returns the step of the newest whole checkpoint; None if there is no whole checkpoint."""
    return max(_whole_steps(all_of(checkpoints).items()), default=None)


def _whole_steps(paths: Iterable[tuple[int, Path]]) -> set[int]:
    return {step for step, path in paths if whole(path)}


@contextlib.contextmanager
def writing(checkpoint: Path):
    """Seals the checkpoint that the block writes. On any failure, removes it and raises CheckpointError with
    the free space and the checkpoint from which the run can be resumed.

    If the run directory itself is gone, raises the original error.
    """
    try:
        yield
        seal(checkpoint)
    except Exception as error:
        shutil.rmtree(checkpoint, ignore_errors=True)
        if not checkpoint.parent.exists():
            raise  # Without a run directory there is nothing to resume.
        free = shutil.disk_usage(checkpoint.parent).free / 2**20
        before = [path.name for path in all_of(checkpoint.parent).values() if whole(path)]
        raise CheckpointError(
            f"could not write {checkpoint}: {type(error).__name__}: {error} ({free:.0f} MB free there). "
            + (f"The run can go on from {before[-1]}" if before else "There is no earlier checkpoint")
            + ": make room, then resume the run directory"
        ) from error


def outdated(steps: Collection[int], scores: Mapping[int, float], policy: CheckpointConfig) -> set[int]:
    """Returns the steps whose checkpoints the policy no longer keeps. Pure.

    steps: the steps of all whole checkpoints. scores: held-out reward by step; a step without a score cannot
    be among the best. Of two equal scores the newer step counts as better.
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
    """Returns the steps that have a score, highest score first; of equal scores the newer step first."""
    return sorted((step for step in steps if step in scores), key=lambda s: (scores[s], s), reverse=True)


def read_scores(metrics: Path, envs: Collection[str]) -> dict[int, float]:
    """Returns the held-out reward by step, as the mean over `envs`, from metrics.jsonl. Evaluations in which
    all rollouts of an environment failed have no score."""
    scores = {}
    for entry in read_lines(metrics):
        rewards = [entry.get(name_of(env, "reward", held_out=True)) for env in envs]
        known = [reward for reward in rewards if reward is not None]
        if len(known) == len(rewards):
            scores[entry["step"]] = fmean(known)
    return scores


def prune(checkpoints: Path, policy: CheckpointConfig, scores: Mapping[int, float]) -> None:
    """Deletes the checkpoints that the policy no longer keeps, the remains of interrupted deletions, and
    unfinished checkpoints that are older than a whole one. With `keep_best`, points the link `best` to the
    best checkpoint.

    A checkpoint that cannot be deleted causes a warning; the next call tries it again.
    """
    paths = all_of(checkpoints)
    # A checkpoint behind a link was put there by the user: it is not ours to delete.
    links = {step for step, path in paths.items() if path.is_symlink()}
    whole_steps = _whole_steps(paths.items())
    unwanted = outdated(whole_steps, scores, policy)
    # A checkpoint that differs from its manifest was changed after it was finished: it is not ours to delete.
    unwanted.update(
        step
        for step, path in paths.items()
        if step < max(whole_steps, default=0) and not (path / _MANIFEST).exists()
    )
    unwanted -= links
    if policy.keep_best and (ranked := best(whole_steps - unwanted, scores)):
        link = checkpoints / "best.part"
        link.unlink(missing_ok=True)
        link.symlink_to(paths[ranked[0]].name)
        link.replace(checkpoints / "best")
    try:
        for step in sorted(unwanted):
            paths[step].rename(checkpoints / f"{_DELETING}{step}")
        for path in checkpoints.glob(f"{_DELETING}*"):
            shutil.rmtree(path)
    except OSError as error:
        log.warning("an old checkpoint could not be deleted: %s", error)
