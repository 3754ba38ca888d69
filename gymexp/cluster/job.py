"""What Slurm says of the job that this process runs in, and the one thing asked of it: to run it again."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

_PATIENCE_S = 60.0  # for a controller of Slurm that is busy, or away
_AGAIN_S = 2.0
# What Slurm's commands say where its controller did not answer; anything else is the controller's answer.
_NO_ANSWER = re.compile(r"contact slurm|timed out|connection (refused|failure)|zero bytes", re.I)


@dataclass(frozen=True)
class Allocation:
    """One start of a job. job_id: as squeue shows it, 123 or 123_4 in an array; node: Slurm's name of it."""

    job_id: str
    restarts: int
    node: str

    @classmethod
    def of_this_process(cls) -> Allocation | None:
        """None outside a job."""
        env = os.environ
        if "SLURM_JOB_ID" not in env:
            return None
        array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
        job_id = f"{array}_{task}" if array and task else env["SLURM_JOB_ID"]
        return cls(job_id, int(env.get("SLURM_RESTART_COUNT") or 0), env.get("SLURMD_NODENAME", ""))

    def goes_on(self) -> bool:
        """Whether Slurm still counts the job as running: then a signal was a warning, of a preemption or of
        the time limit.

        Otherwise the job is being taken down: for good, by scancel, or by Slurm, which starts it again
        itself. `scontrol requeue` would bring back a cancelled job too. True where Slurm does not answer.
        """
        shown = _ask("squeue", "--noheader", "--states=all", f"--jobs={self.job_id}", "--format=%T")
        return shown.returncode != 0 or shown.stdout.strip() in ("RUNNING", "")

    def requeue(self) -> str:
        """Have Slurm end this job and start it again later. Returns Slurm's complaint, empty if it agreed.

        A controller that does not answer is asked again, for as long as it may be busy.
        """
        shown = _ask("scontrol", "requeue", self.job_id)
        return "" if shown.returncode == 0 else shown.stderr.strip() or "scontrol failed"


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    """The command's answer: the first one that is the controller's, or after _PATIENCE_S the last."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        left = max(0.1, until - time.monotonic())
        try:
            shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=left)
        except (OSError, subprocess.TimeoutExpired) as error:
            return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: {error}")
        answered = shown.returncode == 0 or not _NO_ANSWER.search(shown.stderr)
        if answered or time.monotonic() + _AGAIN_S > until:
            return shown
        time.sleep(_AGAIN_S)


@dataclass(frozen=True)
class Task:
    """This process among those of its Slurm job, one a node. attempt: the job and how often it was requeued,
    which tells the lead of this time from that of an earlier one."""

    rank: int
    count: int
    node: str
    attempt: str


def read_task(environ: Mapping[str, str] = os.environ) -> Task | None:
    """None outside Slurm. Host names tell nothing: several slurmd may share one."""
    if "SLURM_PROCID" not in environ or "SLURM_JOB_ID" not in environ:
        return None
    return Task(
        rank=int(environ["SLURM_PROCID"]),
        count=int(environ.get("SLURM_NTASKS", "1")),
        node=environ.get("SLURMD_NODENAME") or socket.gethostname(),
        attempt=f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_RESTART_COUNT', '0')}",
    )
