"""A sweep as its directory shows it: its jobs, what differs between them, and how each stands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gymexp.errors import RunDirectoryError
from gymexp.run.slurm_states import slurm_states
from gymexp.view.run_state import RunState, read_run


@dataclass(frozen=True)
class Job:
    """swept: the values that differ between the sweep's jobs, by key; a trial's own where jobs share a study."""

    num: int
    overrides: Sequence[str]
    swept: dict[str, str]
    job_id: str | None
    run: RunState


@dataclass(frozen=True)
class Sweep:
    path: Path
    launcher: str  # slurm or local
    jobs: list[Job]

    @property
    def keys(self) -> list[str]:
        """What is swept, in the order of the command."""
        return list(dict.fromkeys(key for job in self.jobs for key in job.swept))


def is_sweep(path: Path) -> bool:
    return (path / "sweep.json").exists() or bool(_job_directories(path))


def read_sweep(path: Path) -> Sweep:
    """From sweep.json, or where there is none (a local sweep) from the run directories alone.

    Raises RunDirectoryError if there is neither.
    """
    path = path.resolve()
    if (path / "sweep.json").exists():
        said = json.loads((path / "sweep.json").read_text())
        launcher, planned = said["launcher"], said["jobs"]
    else:
        planned = [_planned(directory) for directory in _job_directories(path)]
        launcher = "slurm" if any(job["job_id"] for job in planned) else "local"
        for job, swept in zip(planned, differing([job["overrides"] for job in planned]), strict=True):
            job["swept"] = swept
    if not planned:
        raise RunDirectoryError(f"{path} is no sweep: it must hold a sweep.json, or run directories 0/ 1/ 2/ …")
    states = slurm_states(job["job_id"] for job in planned if job["job_id"])
    jobs = []
    for job in sorted(planned, key=lambda job: job["num"]):
        directory = path / str(job["num"])
        run = read_run(directory, states, job["job_id"])
        swept = job["swept"] | _trial_values(directory)
        swept.pop("search.trial", None)  # which of the jobs it is, and no setting
        jobs.append(Job(job["num"], job["overrides"], swept, job["job_id"], run))
    return Sweep(path, launcher, jobs)


def differing(overrides_of_jobs: Iterable[Sequence[str]]) -> list[dict[str, str]]:
    """`{key: value}` of each job's overrides that are not the same in all of them."""
    settings = [dict(_split(override) for override in some) for some in overrides_of_jobs]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    swept = [key for key in keys if len({setting.get(key) for setting in settings}) > 1]
    return [{key: setting[key] for key in swept if key in setting} for setting in settings]


def command_of(job: Job) -> list[str]:
    """What goes on with a local run, or starts it where it has not begun."""
    if (job.run.path / "config.yaml").exists():
        return ["-m", "gymexp.train", f"resume={quoted(job.run.path)}"]
    return ["-m", "gymexp.train", *job.overrides, f"output_dir={quoted(job.run.path)}"]


def quoted(path: Path) -> str:
    """A path as Hydra reads it in an override."""
    return shlex.quote(str(path)) if any(c in str(path) for c in " ,=[]{}()") else str(path)


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+").partition("=")
    return key, value


def _job_directories(path: Path) -> list[Path]:
    found = [d for d in path.glob("*") if d.name.isdigit() and d.is_dir()]
    return sorted((d for d in found if _overrides_file(d)), key=lambda d: int(d.name))


def _overrides_file(directory: Path) -> Path | None:
    return next((f for n in ("overrides.yaml", "job.yaml") if (f := directory / n).exists()), None)


def _planned(directory: Path) -> dict[str, Any]:
    file = _overrides_file(directory)
    assert file is not None
    said: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    overrides = said["overrides"] if isinstance(said, dict) else said
    status = directory / "status.json"
    job_id = json.loads(status.read_text()).get("job_id") if status.exists() else None
    return {"num": int(directory.name), "overrides": overrides, "job_id": job_id, "swept": {}}


def _trial_values(directory: Path) -> dict[str, str]:
    """What the study gave this job (gymexp.run.study writes the file)."""
    file = directory / "trial.json"
    return {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in json.loads(file.read_text())["values"].items()} if file.exists() else {}
