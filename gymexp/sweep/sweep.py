"""The dataclasses of a sweep and its jobs, as its tables and its page show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gymexp.record.run_state import RunState


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    swept: the overrides that differ between the sweep's jobs, by key; with a study also the values of the
    job's trial. job_id: Slurm's id of the newest submission, None without one.
    """

    num: int
    overrides: Sequence[str]
    swept: dict[str, str]
    job_id: str | None
    run: RunState


@dataclass(frozen=True)
class Sweep:
    """A sweep as read from its directory."""

    path: Path
    launcher: str  # slurm or local
    jobs: list[Job]
    study: Sequence[str] = ()  # lines about the study that the jobs share, empty without one

    @property
    def keys(self) -> list[str]:
        """The swept keys, in the order of the command."""
        return list(dict.fromkeys(key for job in self.jobs for key in job.swept))
