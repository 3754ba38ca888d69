"""A sweep as its tables and its page show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gymexp.record.state import RunState


@dataclass(frozen=True)
class Job:
    """swept: what differs between the sweep's jobs, by key; with a study, the values of the job's trial."""

    num: int
    overrides: Sequence[str]
    swept: dict[str, str]
    job_id: str | None
    run: RunState


@dataclass(frozen=True)
class Sweep:
    """A sweep as its directory has it."""

    path: Path
    launcher: str  # slurm or local
    jobs: list[Job]
    study: Sequence[str] = ()  # what is said of a study that the jobs share, a line each

    @property
    def keys(self) -> list[str]:
        """What is swept, in the order of the command."""
        return list(dict.fromkeys(key for job in self.jobs for key in job.swept))
