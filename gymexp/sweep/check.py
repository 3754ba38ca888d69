"""The checks of a sweep's jobs before the first one starts, and the results that Hydra gets after the last
one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from gymexp.cli import hydra_keys
from gymexp.config import load as loading
from gymexp.errors import ConfigError, GymexpError, LaunchError
from gymexp.sweep.freeze import FrozenJob, name_of, swept_of

if TYPE_CHECKING:
    from gymexp.sweep.kinds import Kind


@dataclass(frozen=True)
class End:
    """How a job ended.

    result: the run's result.json. error: why the job failed, None if it did not. log: the job's log file, or
    the folder with the run's logs.
    """

    name: str
    result: dict[str, Any]
    error: str | None
    log: Path


def check_jobs(
    launcher: Launcher,
    job_overrides: Sequence[Sequence[str]],
    first: int,
    kind: Kind,
    check_for_launcher: Callable[[FrozenJob], object],
) -> dict[int, FrozenJob]:
    """Returns the jobs by number, counted from `first`, after composing and checking their configurations.

    check_for_launcher: raises GymexpError for a job that only this launcher refuses.
    Raises ConfigError with every mistake and the jobs that have it.
    """
    if not job_overrides:
        raise ConfigError("a sweep must have at least one job, got a key without any value, as in range(0,0)")
    jobs: dict[int, FrozenJob] = {}
    logging.getLogger(loading.__name__).setLevel(logging.WARNING)  # its lines are the same for all jobs
    wrong: dict[str, list[str]] = {}
    own_overrides = [list(filter_overrides(overrides)) for overrides in job_overrides]  # without Hydra's keys
    names = {num: name_of(num, swept) for num, swept in enumerate(swept_of(own_overrides), first)}
    for num, overrides in enumerate(job_overrides, first):
        try:
            job = kind.frozen(_compose(launcher, overrides), own_overrides[num - first])
            check_for_launcher(job)
            jobs[num] = job
        except (GymexpError, HydraException) as error:
            wrong.setdefault(str(error), []).append(names[num])
    if not wrong:
        for num, text in zip(jobs, kind.problems(list(jobs.values())), strict=True):
            if text:
                wrong.setdefault(text, []).append(names[num])
    if wrong:
        count = sum(len(same) for same in wrong.values())
        lines = [f"{same[0]}{_and_more(same)}:\n{text}" for text, same in wrong.items()]
        raise ConfigError(
            "\n".join([f"nothing was started: {count} of {len(job_overrides)} jobs are wrong", *lines])
        )
    return jobs


def returns(jobs: Mapping[int, FrozenJob], ends: Mapping[int, End]) -> list[JobReturn]:
    """Returns the jobs' results for Hydra's sweeper. Raises LaunchError with the name, error and log of each
    failed job."""
    if failed := [
        f"{end.name} failed: {end.error}\n    log: {end.log}" for end in ends.values() if end.error
    ]:
        raise LaunchError("\n".join([f"{len(failed)} of {len(ends)} jobs failed", *failed]))
    return [
        JobReturn(
            jobs[num].overrides,
            OmegaConf.structured(jobs[num].config),
            status=JobStatus.COMPLETED,
            _return_value=end.result,
        )
        for num, end in ends.items()
    ]


def _compose(launcher: Any, overrides: Sequence[str]) -> DictConfig:
    """Returns the composed configuration of one job. Raises ConfigError or HydraException.

    launcher: a launcher that Hydra has set up, so that it has the sweep's configuration and Hydra's loader.
    """
    cfg = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, list(overrides))
    hydra_keys.check_options(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
