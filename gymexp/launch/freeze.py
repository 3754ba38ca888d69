"""What a sweep is made of, fixed when it is submitted: its code, and each job's whole configuration.

outputs/<name>/sweep_<date_time>/
    sweep.json code/ slurm/ 0/ 1/ 2/ …          each with a job.yaml, and a run's files once it has begun
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gymexp import config as configuration
from gymexp.config import RunConfig
from gymexp.run.directory import replace_file


@dataclass(frozen=True)
class FrozenJob:
    """One job of a sweep: its checked configuration, and the overrides that made it."""

    config: RunConfig
    overrides: list[str]


def write_job(directory: Path, job: FrozenJob) -> None:
    """Fix a job in `directory`/job.yaml."""
    directory.mkdir(parents=True, exist_ok=True)
    said = {"overrides": job.overrides, "config": dataclasses.asdict(job.config)}
    replace_file(directory / "job.yaml", OmegaConf.to_yaml(OmegaConf.create(said)))


def read_job(directory: Path) -> FrozenJob:
    said: Any = OmegaConf.load(directory / "job.yaml")
    return FrozenJob(configuration.load(said.config), list(said.overrides))
