"""States of Slurm jobs, read from squeue, and from sacct if the cluster keeps accounting."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

_TIMEOUT_S = 60.0  # for one Slurm command
# Without accounting, Slurm forgets a job some minutes after its end, and answers with one of these errors.
_UNKNOWN_JOB = ("Invalid job id", "accounting storage is disabled")
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
# States of jobs that have not ended. Every other state is an end: COMPLETED, FAILED, CANCELLED, TIMEOUT, …
GOING_ON = _WAITING | {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING"}
GOING_ON |= {"SIGNALING", "POWER_UP_NODE", "STAGE_OUT"}


@dataclass(frozen=True)
class SlurmState:
    """The state of one job. name: Slurm's word, e.g. PENDING, OUT_OF_MEMORY. reason: why the job waits, or
    the nodes that it runs on."""

    name: str
    reason: str = ""

    @property
    def waits(self) -> bool:
        return self.name in _WAITING

    @property
    def over(self) -> bool:
        return self.name not in GOING_ON


def slurm_states(job_ids: Iterable[str]) -> dict[str, SlurmState] | None:
    """Returns the states of the jobs that Slurm still knows, by id (an array's element is "123_4").

    Returns None if squeue does not answer, or if sacct does not answer for a job that squeue has forgotten.
    The state of every job is unknown then, and no job counts as ended.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    numbers = ",".join(sorted({job.partition("_")[0] for job in wanted}))
    queued = _rows(["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%R", "-j", numbers])
    if queued is None:
        return None
    found = {job: SlurmState(state, reason) for job, state, reason in queued}
    if wanted - found.keys():
        accounted = _rows(["sacct", "-n", "-P", "-X", "-j", numbers, "-o", "JobID,State,NodeList"])
        if accounted is None:
            return None
        for job, state, nodes in accounted:
            found.setdefault(job, SlurmState(state.split()[0], nodes))  # the state may be "CANCELLED by 1000"
    return {job: state for job, state in found.items() if job in wanted}


def _rows(command: list[str]) -> list[list[str]] | None:
    """Returns a Slurm command's output lines that have three fields, split at `|`.

    Returns None if the command is missing, fails, or does not end within _TIMEOUT_S.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if any(text in result.stderr for text in _UNKNOWN_JOB):
        return []
    if result.returncode != 0 or "error:" in result.stderr:
        return None
    rows = [line.split("|", 2) for line in result.stdout.splitlines()]
    return [row for row in rows if len(row) == 3]
