"""A sweep's jobs without a good end, submitted again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gymexp.errors import LaunchError
from gymexp.sweep import freeze
from gymexp.sweep.jobs import _goes_on
from gymexp.sweep.sweep import Job, Sweep

# A job of Slurm's is stopped alone, by scancel, and may have been meant; a Ctrl-C stops all of a local sweep.
_AGAIN = {"slurm": ("failed", "lost"), "local": ("failed", "lost", "stopped")}


_WHY_NOT = {
    "finished": "it has its result",
    "pruned": "its study has ended it",
    "running": "it goes on",
    "waiting": "it is submitted, or was never begun",
    "stopped": "it was ended on purpose: name it by --jobs",
}


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
        from gymexp.sweep.slurm import submit

        for num, job_id in submit(sweep.path, [job.num for job in again]).items():
            say(f"job {num} submitted as {job_id}")
        return
    from gymexp.sweep.local import run_jobs

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
