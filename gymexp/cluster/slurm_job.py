"""The Slurm job that this process runs in: its id and task, whether it still runs, and its requeueing."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

_TIMEOUT_S = 60.0  # how long Slurm's controller may be busy or unreachable
_RETRY_INTERVAL_S = 2.0
# Errors of Slurm's commands that mean "no answer of the controller". Any other output is its answer.
_NO_ANSWER = re.compile(r"contact slurm|timed out|connection (refused|failure)|zero bytes", re.I)


@dataclass(frozen=True)
class Allocation:
    """One start of a Slurm job.

    job_id: as squeue shows it, 123, or 123_4 in an array. restarts: how often Slurm has requeued the job.
    node: Slurm's name of the node.
    """

    job_id: str
    restarts: int
    node: str

    @classmethod
    def of_this_process(cls) -> Allocation | None:
        """Returns the allocation that this process runs in, None outside a Slurm job."""
        env = os.environ
        if "SLURM_JOB_ID" not in env:
            return None
        array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
        job_id = f"{array}_{task}" if array and task else env["SLURM_JOB_ID"]
        return cls(job_id, int(env.get("SLURM_RESTART_COUNT") or 0), env.get("SLURMD_NODENAME", ""))

    def goes_on(self) -> bool:
        """Returns whether Slurm still counts the job as running. A signal was then a warning before a
        preemption or the time limit.

        Otherwise the job is being ended: by scancel for good, or by Slurm, which starts it again itself. The
        caller must know, because `scontrol requeue` would bring back a cancelled job too. Returns True if
        Slurm does not answer.
        """
        result = _run_command("squeue", "--noheader", "--states=all", f"--jobs={self.job_id}", "--format=%T")
        return result.returncode != 0 or result.stdout.strip() in ("RUNNING", "")

    def requeue(self) -> str:
        """Have Slurm end this job and start it again later. Returns Slurm's error, empty if Slurm agreed.

        The request is repeated for up to _TIMEOUT_S while Slurm's controller does not answer.
        """
        result = _run_command("scontrol", "requeue", self.job_id)
        return "" if result.returncode == 0 else result.stderr.strip() or "scontrol failed"


def _run_command(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command until the controller answers, for at most _TIMEOUT_S. Returns the last result."""
    until = time.monotonic() + _TIMEOUT_S
    while True:
        left = max(0.1, until - time.monotonic())
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=left)
        except (OSError, subprocess.TimeoutExpired) as error:
            return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: {error}")
        answered = result.returncode == 0 or not _NO_ANSWER.search(result.stderr)
        if answered or time.monotonic() + _RETRY_INTERVAL_S > until:
            return result
        time.sleep(_RETRY_INTERVAL_S)


@dataclass(frozen=True)
class Task:
    """This process as a task of its Slurm job, which has one task a node.

    count: the job's tasks. attempt: `<job id>.<restarts>`, which tells the lead of this start of the job from
    the lead of an earlier start.
    """

    rank: int
    count: int
    node: str
    attempt: str


def read_task(environ: Mapping[str, str] = os.environ) -> Task | None:
    """Returns the task that this process is, None outside Slurm.

    The node's name is Slurm's: several slurmd may share one host name.
    """
    if "SLURM_PROCID" not in environ or "SLURM_JOB_ID" not in environ:
        return None
    return Task(
        rank=int(environ["SLURM_PROCID"]),
        count=int(environ.get("SLURM_NTASKS", "1")),
        node=environ.get("SLURMD_NODENAME") or socket.gethostname(),
        attempt=f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_RESTART_COUNT', '0')}",
    )
