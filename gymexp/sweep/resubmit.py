"""The resubmission of a sweep's jobs that failed, were lost or were stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gymexp.errors import LaunchError
from gymexp.record.directory import RunDirectory
from gymexp.sweep import freeze
from gymexp.sweep.kinds import kind_of
from gymexp.sweep.sweep import Job, Sweep
from gymexp.sweep.sweep_reader import is_running

# States of jobs that are submitted again by default. scancel stops a single Slurm job, perhaps on purpose,
# but a Ctrl-C stops a whole local sweep.
_RESUBMITTED = {"slurm": ("failed", "lost"), "local": ("failed", "lost", "stopped")}

_WHY_NOT = {
    "finished": "it has its result",
    "pruned": "its study ended it early",
    "running": "it still runs",
    "waiting": "it waits in the queue, or never began",
    "stopped": "it was ended on purpose: name it by --jobs",
}


def resubmit(sweep: Sweep, nums: Sequence[int] | None, say: Callable[[str], None] = print) -> None:
    """Submit jobs again; each continues from what it has kept. Jobs of a local sweep run on this
    machine, one after the other, before this function returns.

    nums: the jobs, of which those that failed, were lost or were stopped are submitted. None: all that failed
    or were lost, and in a local sweep all that were stopped.
    Raises LaunchError if a job of `nums` is not in the sweep, a local sweep still runs, Slurm refuses the
    jobs, or a local job fails again.
    """
    if sweep.launcher == "local" and is_running(freeze.read_sweep(sweep.path), sweep.jobs):
        raise LaunchError(f"{sweep.path} still runs: wait for its end, or end it by Ctrl-C where it runs")
    known = {job.num for job in sweep.jobs}
    if unknown := sorted(set(nums or ()) - known):
        raise LaunchError(f"--jobs must name jobs of {sweep.path}, got {unknown}: it has {_listed(known)}")
    chosen = [job for job in sweep.jobs if _is_chosen(job, sweep.launcher, nums)]
    for job in sweep.jobs:
        if job not in chosen and (nums is None or job.num in nums):
            say(f"job {job.num} is not submitted: {job.run.state}, {_WHY_NOT.get(job.run.state, '')}")
    if not chosen:
        say("nothing to submit again")
        return
    for job in chosen:
        say(f"job {job.num} {job.run.state}: {job.run.why or 'no reason known'}; {_start_of(job)}")
    if sweep.launcher == "slurm":
        from gymexp.sweep.slurm import submit

        for num, job_id in submit(sweep.path, [job.num for job in chosen]).items():
            say(f"job {num} submitted as {job_id}")
        return
    from gymexp.sweep.local import run_jobs

    ends = run_jobs(sweep.path, [job.num for job in chosen])
    if failed := [num for num, end in ends.items() if end.error]:
        command = f"python -m gymexp.sweep status {sweep.path}"
        raise LaunchError(f"failed again: jobs {_listed(failed)}; see {command}")


def _is_chosen(job: Job, launcher: str, nums: Sequence[int] | None) -> bool:
    if nums is None:
        return job.run.state in _RESUBMITTED[launcher]
    return job.num in nums and job.run.state in ("failed", "lost", "stopped")


def _start_of(job: Job) -> str:
    directory = RunDirectory(job.run.path)
    return kind_of(freeze.read_job(directory.path)).going_on(directory)


def _listed(nums: Any) -> str:
    return ", ".join(map(str, sorted(nums)))
