"""The jobs of a sweep, composed and checked before the first one starts; and what Hydra gets of them in the
end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf, open_dict

from gymexp.cli import hydra_keys
from gymexp.config import load as loading
from gymexp.config.load import load
from gymexp.config.schema import RunConfig
from gymexp.errors import ConfigError, GymexpError, LaunchError
from gymexp.record.places import cache_dir
from gymexp.sweep.freeze import FrozenJob, name_of, swept_of
from gymexp.training import arguments, schedule


@dataclass(frozen=True)
class End:
    """How a job ended. result: the run's result.json; error: why there is none, else None. log: a file, or
    the folder of a run's."""

    name: str
    result: dict[str, Any]
    error: str | None
    log: Path


def check_jobs(
    launcher: Launcher,
    job_overrides: Sequence[Sequence[str]],
    first: int,
    further: Callable[[RunConfig], object] = lambda config: None,
) -> dict[int, FrozenJob]:
    """The jobs by number, from `first` on. further: raises GymexpError for what one launcher alone refuses.

    Raises ConfigError with every mistake and the jobs that make it.
    """
    if not job_overrides:
        raise ConfigError("a sweep must have at least one job, got a key without any value, as in range(0,0)")
    jobs: dict[int, FrozenJob] = {}
    logging.getLogger(loading.__name__).setLevel(logging.WARNING)  # what is said of each is the same
    wrong: dict[str, list[str]] = {}
    said = [list(filter_overrides(overrides)) for overrides in job_overrides]
    names = {num: name_of(num, swept) for num, swept in enumerate(swept_of(said), first)}
    for num, overrides in enumerate(job_overrides, first):
        try:
            config = _compose(launcher, overrides)
            further(config)
            jobs[num] = FrozenJob(config, said[num - first])
        except (GymexpError, HydraException) as error:
            wrong.setdefault(str(error), []).append(names[num])
    if not wrong:
        told = arguments.problems([job.config for job in jobs.values()], cache_dir())
        for num, text in zip(jobs, told, strict=True):
            if text := text or _too_few_tasks(jobs[num].config):
                wrong.setdefault(text, []).append(names[num])
    if wrong:
        count = sum(len(which) for which in wrong.values())
        lines = [f"{which[0]}{_and_more(which)}:\n{text}" for text, which in wrong.items()]
        raise ConfigError(
            "\n".join([f"nothing was started: {count} of {len(job_overrides)} jobs are wrong", *lines])
        )
    return jobs


def returns(jobs: Mapping[int, FrozenJob], ends: Mapping[int, End]) -> list[JobReturn]:
    """What a sweeper gets of the jobs. Raises LaunchError with all that failed."""
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


def _too_few_tasks(config: RunConfig) -> str:
    """Why even one training process would have nothing to train on; of a trial its own start says so, as the
    batch may be the study's to choose."""
    try:
        if config.search.trial is None:
            schedule.check(config, num_ranks=1)
    except ConfigError as error:
        return str(error)
    return ""


def _compose(launcher: Any, overrides: Sequence[str]) -> RunConfig:
    """launcher: set up by Hydra, so that it has the configuration of all and what composes a job's."""
    cfg = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, list(overrides))
    hydra_keys.check_options(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    config = load(cfg)
    given = [key for key in ("output_dir", "resume") if getattr(config, key) is not None]
    if given:
        raise ConfigError(
            f"{given[0]} must not be set in a sweep or with launcher=slurm: say hydra.sweep.dir=… for the "
            "directory of the runs; those that ended early go on by: python -m gymexp.sweep resubmit DIR"
        )
    return config


def _and_more(which: list[str]) -> str:
    return f" and {len(which) - 1} more" if len(which) > 1 else ""


def refuse_dry_run(config: RunConfig) -> None:
    """Raises ConfigError where a run would start here that was meant to be shown."""
    if config.launcher.dry_run:
        raise ConfigError(
            "launcher.dry_run shows what launcher=slurm would submit, got launcher=local: say launcher=slurm "
            "as well, or --cfg job for the configuration"
        )
