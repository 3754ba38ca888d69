"""Which weights of a run are exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gymexp.config.load import from_yaml
from gymexp.config.schema import RunConfig
from gymexp.errors import RunDirectoryError
from gymexp.record.directory import RunDirectory, is_whole
from gymexp.record.own_files import check_own, check_own_file
from gymexp.training import checkpoints


@dataclass(frozen=True)
class Chosen:
    """The policy of a run after `step` optimizer steps. path: its checkpoint, or the run's `model/`."""

    run: Path
    config: RunConfig
    step: int
    path: Path


def open_run(path: Path) -> RunConfig:
    """Returns the configuration of a run. Raises RunDirectoryError if the directory is no run's."""
    if not (path / "config.yaml").is_file():
        raise RunDirectoryError(
            f"{path} must be the directory of a run (outputs/<name>/<date_time>), but it has no config.yaml"
        )
    check_own(path)
    return from_yaml(path / "config.yaml")


def choose(run: Path, wanted: str) -> Chosen:
    """Returns the policy that `--checkpoint` names: last, best (by held-out reward), or a step.

    Raises RunDirectoryError if the run has no such checkpoint, or if it is damaged.
    """
    config = open_run(run)
    directory = RunDirectory(run)
    paths = {
        step: path
        for step, path in checkpoints.all_of(directory.checkpoints).items()
        if checkpoints.whole(path)
    }
    result = directory.read_result()
    if is_whole(result) and not result.get("pruned") and (run / "model" / "config.json").is_file():
        paths[result["step"]] = run / "model"
    if not paths:
        raise RunDirectoryError(
            f"{run} has neither a whole checkpoint nor a final model yet: wait for the first checkpoint "
            "(trainer.save_steps) or for the run's end"
        )
    step = _step_of(wanted, paths, run, config)
    if paths[step] != run / "model" and (damage := checkpoints.damage(paths[step])):
        raise RunDirectoryError(f"{paths[step]} is damaged, {damage}: choose another by --checkpoint")
    for path in (*paths[step].rglob("*"), *(run / "adapter").glob("*")):
        if path.is_symlink() or not path.is_dir():
            check_own_file(run, path)
    return Chosen(run, config, step, paths[step])


def _step_of(wanted: str, paths: dict[int, Path], run: Path, config: RunConfig) -> int:
    known = ", ".join(map(str, sorted(paths)))
    if wanted == "last":
        return max(paths)
    if wanted == "best":
        ranked = checkpoints.best(paths, checkpoints.read_scores(run / "metrics.jsonl", config.env))
        if not ranked:
            raise RunDirectoryError(
                f"--checkpoint best needs a held-out evaluation after the step of a checkpoint, and {run} "
                f"has none: name a step of {known}"
            )
        return ranked[0]
    if not wanted.isdecimal() or int(wanted) not in paths:
        raise RunDirectoryError(
            f"--checkpoint must be last, best, or the step of a whole checkpoint ({known}), got {wanted!r}"
        )
    return int(wanted)
