"""What Slurm says of jobs: squeue, and sacct where there is accounting."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

_PATIENCE_S = 60.0  # for Slurm to answer
# Of a job that ended some minutes ago, Slurm without accounting knows nothing any more.
_KNOWS_NONE = ("Invalid job id", "accounting storage is disabled")
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
# What Slurm calls a job that is not over. Any other word is an end: COMPLETED, FAILED, CANCELLED, TIMEOUT, …
GOING_ON = _WAITING | {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING"}
GOING_ON |= {"SIGNALING", "POWER_UP_NODE", "STAGE_OUT"}


@dataclass(frozen=True)
class SlurmState:
    """name: Slurm's word, e.g. PENDING, OUT_OF_MEMORY. reason: its reason, or the node."""

    name: str
    reason: str = ""

    @property
    def waits(self) -> bool:
        return self.name in _WAITING

    @property
    def over(self) -> bool:
        return self.name not in GOING_ON


def slurm_states(job_ids: Iterable[str]) -> dict[str, SlurmState] | None:
    """States of the jobs that Slurm still knows, by id (an array's element is "123_4").

    None where Slurm does not answer, or its accounting does not for a job that the queue has forgotten: then
    nothing is known of any job, and none counts as ended.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    numbers = ",".join(sorted({job.partition("_")[0] for job in wanted}))
    queued = _lines(["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%R", "-j", numbers])
    if queued is None:
        return None
    found = {job: SlurmState(state, reason) for job, state, reason in queued}
    if wanted - found.keys():
        said = _lines(["sacct", "-n", "-P", "-X", "-j", numbers, "-o", "JobID,State,NodeList"])
        if said is None:
            return None
        for job, state, nodes in said:
            found.setdefault(job, SlurmState(state.split()[0], nodes))  # "CANCELLED by 1000"
    return {job: state for job, state in found.items() if job in wanted}


def _lines(command: list[str]) -> list[list[str]] | None:
    """Rows of three fields; None if the command is missing, or Slurm does not answer it."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if any(text in answer.stderr for text in _KNOWS_NONE):
        return []
    if answer.returncode != 0 or "error:" in answer.stderr:
        return None
    rows = [line.split("|", 2) for line in answer.stdout.splitlines()]
    return [row for row in rows if len(row) == 3]
