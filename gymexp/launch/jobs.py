"""A sweep's jobs read from its directory, and those without a good end submitted again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gymexp.errors import LaunchError, RunDirectoryError
from gymexp.launch import freeze
from gymexp.run.slurm_states import slurm_states
from gymexp.search.study import TRIAL_KEY, read_trial, summary
from gymexp.view.run_state import process_lives, read_run
from gymexp.view.sweep import Job, Sweep

# A job of Slurm's is stopped alone, by scancel, and may have been meant; a Ctrl-C stops all of a local sweep.
_AGAIN = {"slurm": ("failed", "lost"), "local": ("failed", "lost", "stopped")}
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


def resubmit(sweep: Sweep, nums: Sequence[int] | None, say: Callable[[str], None] = print) -> None:
    """Failed and lost jobs once more, or those of `nums` that have no result; each goes on from its newest
    checkpoint. A local sweep's run here, one after the other.

    Raises LaunchError if a job of `nums` is not the sweep's, a local sweep goes on elsewhere, or a local run
    fails again.
    """
    if sweep.launcher == "local" and _goes_on(freeze.read_sweep(sweep.path), sweep.jobs):
        raise LaunchError(f"{sweep.path} still goes on: wait for its end, or end it by Ctrl-C where it runs")
    known = {job.num for job in sweep.jobs}
    if unknown := sorted(set(nums or ()) - known):
        raise LaunchError(f"--jobs must name jobs of {sweep.path}, got {unknown}: it has {_listed(known)}")
    again = [job for job in sweep.jobs if _goes_again(job, sweep.launcher, nums)]
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
    from gymexp.launch.local import run_jobs

    ends = run_jobs(sweep.path, [job.num for job in again])
    if failed := [num for num, end in ends.items() if end.error]:
        how = f"python -m gymexp.sweep status {sweep.path}"
        raise LaunchError(f"failed again: jobs {_listed(failed)}; see {how}")


def _goes_again(job: Job, launcher: str, nums: Sequence[int] | None) -> bool:
    if nums is None:
        return job.run.state in _AGAIN[launcher]
    return job.num in nums and job.run.state in ("failed", "lost", "stopped")


def _from(job: Job) -> str:
    from gymexp.training.checkpoints import newest_step

    step = newest_step(job.run.path / "checkpoints")
    return "begins anew" if step is None else f"goes on from checkpoint-{step}"


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
