"""A sweep's jobs read from its directory, and those without a good end submitted again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gymexp.errors import LaunchError, RunDirectoryError
from gymexp.launch import freeze
from gymexp.run.slurm_states import slurm_states
from gymexp.search.study import TRIAL_KEY, read_trial, summary
from gymexp.view.run_state import read_run
from gymexp.view.sweep import Job, Sweep

_AGAIN = ("failed", "lost")
_WHY_NOT = {
    "finished": "it has its result",
    "pruned": "its study has ended it",
    "running": "it goes on",
    "waiting": "it is submitted, or was never begun",
    "stopped": "it was ended on purpose: name it by --jobs",
}


def is_sweep(path: Path) -> bool:
    return (path / "sweep.json").exists() or bool(_job_directories(path))


def read_sweep(path: Path) -> Sweep:
    """From sweep.json, or where there is none (a local sweep, a lost file) from the run directories alone.

    Raises RunDirectoryError if there is neither.
    """
    path = path.resolve()
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
    return Sweep(path, launcher, jobs, summary(path))


def resubmit(sweep: Sweep, nums: Sequence[int] | None, say: Callable[[str], None] = print) -> None:
    """Failed and lost jobs once more, or those of `nums` that have no result; each goes on from its newest
    checkpoint. A local sweep's run here, one after the other.

    Raises LaunchError if a job of `nums` is not the sweep's, or a local run fails again.
    """
    known = {job.num for job in sweep.jobs}
    if unknown := sorted(set(nums or ()) - known):
        raise LaunchError(f"--jobs must name jobs of {sweep.path}, got {unknown}: it has {_listed(known)}")
    again = [job for job in sweep.jobs if _goes_again(job, nums)]
    for job in sweep.jobs:
        if job not in again and (nums is None or job.num in nums):
            say(f"job {job.num} is not submitted: {job.run.state}, {_WHY_NOT.get(job.run.state, '')}")
    if not again:
        say("nothing to submit again")
        return
    for job in again:
        say(f"job {job.num} {job.run.state}: {job.run.why or 'no reason known'}; {_from(job)}")
    if sweep.launcher == "slurm":
        from gymexp.launch.slurm import submit

        for num, job_id in submit(sweep.path, [job.num for job in again]).items():
            say(f"job {num} submitted as {job_id}")
        return
    failed = [job.num for job in again if subprocess.run([sys.executable, *command_of(job)]).returncode]
    if failed:
        how = f"python -m gymexp.sweep status {sweep.path}"
        raise LaunchError(f"failed again: jobs {_listed(failed)}; see {how}")


def _goes_again(job: Job, nums: Sequence[int] | None) -> bool:
    if nums is None:
        return job.run.state in _AGAIN
    return job.num in nums and job.run.state in (*_AGAIN, "stopped")


def _from(job: Job) -> str:
    from gymexp.training.checkpoints import newest_step

    step = newest_step(job.run.path / "checkpoints")
    return "begins anew" if step is None else f"goes on from checkpoint-{step}"


def command_of(job: Job) -> list[str]:
    """What goes on with a local run, or starts it where it has not begun."""
    where = str(job.run.path).replace("'", r"\'")  # quoted for Hydra, whose grammar gives , [ = a meaning
    if (job.run.path / "config.yaml").exists():
        return ["-m", "gymexp.train", f"resume='{where}'"]
    return ["-m", "gymexp.train", *job.overrides, f"output_dir='{where}'"]


def _listed(nums: Any) -> str:
    return ", ".join(map(str, sorted(nums)))


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
