"""A sweep's jobs read from its directory, and those without a good end submitted again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gymexp.cluster.slurm import slurm_states
from gymexp.errors import RunDirectoryError
from gymexp.record.state import process_lives, read_run
from gymexp.record.study import TRIAL_KEY, read_trial, summary
from gymexp.sweep import freeze
from gymexp.sweep.sweep import Job, Sweep


def is_sweep(path: Path) -> bool:
    """Whether a directory holds a sweep, also one that lost its sweep.json."""
    return (path / "sweep.json").exists() or bool(_job_directories(path))


def read_sweep(path: Path) -> Sweep:
    """From sweep.json, or where it is lost from the run directories alone.

    Raises RunDirectoryError if there is neither.
    """
    path = path.resolve()
    said: dict[str, Any] = {}
    if (path / "sweep.json").exists():
        said = freeze.read_sweep(path)
        launcher, planned = said["launcher"], said["jobs"]
    else:
        planned = [_planned(directory) for directory in _job_directories(path)]
        launcher = "slurm" if any(job["job_id"] for job in planned) else "local"
        for job, swept in zip(planned, freeze.swept_of([job["overrides"] for job in planned]), strict=True):
            job["swept"] = swept
    if not planned:
        raise RunDirectoryError(f"{path} must be a sweep, with a sweep.json or run directories 0/ 1/ 2/ …")
    states = slurm_states(job["job_id"] for job in planned if job["job_id"])
    jobs = []
    for job in sorted(planned, key=lambda job: job["num"]):
        directory = path / str(job["num"])
        swept = {key: value for key, value in job["swept"].items() if key != TRIAL_KEY}
        if trial := read_trial(directory):
            swept |= {key: _said(value) for key, value in trial.values.items()}
        run = read_run(directory, states, job["job_id"])
        jobs.append(Job(job["num"], job["overrides"], swept, job["job_id"], run))
    if launcher == "local" and not _goes_on(said, jobs):
        jobs = [_not_begun(job) if job.run.state == "waiting" else job for job in jobs]
    return Sweep(path, launcher, jobs, summary(path))


def _goes_on(said: Mapping[str, Any], jobs: Sequence[Job]) -> bool:
    """Whether the process of a local sweep still runs its jobs; on another machine one that runs tells."""
    lives = process_lives(said)
    return any(job.run.state == "running" for job in jobs) if lives is None else lives


def _not_begun(job: Job) -> Job:
    run = dataclasses.replace(job.run, state="stopped", why="its sweep ended before it began")
    return dataclasses.replace(job, run=run)


def _said(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _job_directories(path: Path) -> list[Path]:
    found = [d for d in path.glob("*") if d.name.isdigit() and d.is_dir() and _overrides_file(d)]
    return sorted(found, key=lambda d: int(d.name))


def _overrides_file(directory: Path) -> Path | None:
    return next((f for name in ("overrides.yaml", "job.yaml") if (f := directory / name).exists()), None)


def _planned(directory: Path) -> dict[str, Any]:
    """The entry that sweep.json would have."""
    file = _overrides_file(directory)
    assert file is not None
    said: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    overrides = said["overrides"] if isinstance(said, dict) else said
    job_id = read_run(directory).status.get("job_id")
    return {"num": int(directory.name), "overrides": list(overrides), "job_id": job_id, "swept": {}}
