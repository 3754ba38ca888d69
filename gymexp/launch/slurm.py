"""`launcher=slurm`: every job of a sweep composed, checked and frozen, then submitted as one array.

Hydra's submitit launcher, but for two things: its jobs read configuration and code when they start, and it
learns how they are from `sacct` alone. Here a job runs what was there at submission.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.errors import HydraException
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from gymexp import config as configuration
from gymexp.config import ConfigError, RunConfig
from gymexp.errors import GymexpError, LaunchError
from gymexp.launch import job, sbatch, watch
from gymexp.launch.freeze import FrozenJob, freeze, read_job, read_sweep, take_back, write_sweep
from gymexp.run.directory import RunDirectory, cache_dir
from gymexp.run.placement import place
from gymexp.training import arguments

log = logging.getLogger(__name__)


class SlurmLauncher(submitit_launcher.SlurmLauncher):
    """Under the name of the class it replaces (`gymexp.run.entry`), so that its configuration is the same."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit one job a list of overrides, and wait for all. Raises GymexpError before anything is
        submitted."""
        assert self.config is not None
        sweep = Path(str(self.config.hydra.sweep.dir)).resolve()
        more = sbatch.extras(self.params)
        try:
            jobs = self._check(job_overrides, initial_job_idx)
            if next(iter(jobs.values())).config.launcher.dry_run:
                _show(sweep, jobs, more)
                raise SystemExit(0)
            freeze(sweep, "slurm", jobs, more)
            submit(sweep, list(jobs))
        except BaseException:
            take_back(sweep, range(initial_job_idx, initial_job_idx + len(job_overrides)))
            raise
        ends = watch.wait(sweep, list(jobs))
        return [_returned(jobs[num], end, ends) for num, end in ends.items()]

    def _check(self, job_overrides: Sequence[Sequence[str]], first: int) -> dict[int, FrozenJob]:
        """The jobs by number. Raises ConfigError with every mistake and the jobs that make it."""
        jobs: dict[int, FrozenJob] = {}
        wrong: dict[str, list[str]] = {}
        for num, overrides in enumerate(job_overrides, first):
            said = list(filter_overrides(overrides))
            try:
                jobs[num] = FrozenJob(self._compose(overrides), said)
            except (GymexpError, HydraException) as error:
                wrong.setdefault(str(error), []).append(f"job {num} ({' '.join(said)})")
        if not wrong:
            told = arguments.problems([job.config for job in jobs.values()], cache_dir())
            for num, text in zip(jobs, told, strict=True):
                if text:
                    wrong.setdefault(text, []).append(f"job {num} ({' '.join(jobs[num].overrides)})")
        if wrong:
            count = sum(len(which) for which in wrong.values())
            lines = [f"{which[0]}{_and_more(which)}:\n{text}" for text, which in wrong.items()]
            raise ConfigError(
                "\n".join([f"nothing was submitted: {count} of {len(job_overrides)} jobs", *lines])
            )
        return jobs

    def _compose(self, overrides: Sequence[str]) -> RunConfig:
        assert self.hydra_context is not None and self.config is not None
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(cfg):
            del cfg["hydra"]
        config = configuration.load(cfg)
        for key in ("output_dir", "resume"):
            if getattr(config, key) is not None:
                raise ConfigError(
                    f"{key} must not be set with launcher=slurm, whose runs lie in hydra.sweep.dir; those "
                    "that ended early go on by: python -m gymexp.sweep resubmit DIR"
                )
        if config.launcher.gpus is not None:
            place(config, [str(gpu) for gpu in range(config.launcher.gpus)])
        return config


def submit(sweep: Path, nums: Sequence[int]) -> dict[int, str]:
    """Submit jobs of a frozen sweep, for the first time or again; returns their Slurm ids by number.

    A job whose directory holds a run goes on with it. Jobs that ask Slurm for the same become one array.
    Raises LaunchError with what sbatch says.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    sweep = sweep.resolve()
    said = read_sweep(sweep)
    arrays: dict[str, list[int]] = {}
    for num in nums:
        asked = sbatch.parameters(read_job(sweep / str(num)).config, said["sbatch"], sweep)
        arrays.setdefault(OmegaConf.to_yaml(OmegaConf.create(asked)), []).append(num)
    ids: dict[int, str] = {}
    for asked, some in arrays.items():
        for num in some:
            RunDirectory(sweep / str(num)).result.unlink(missing_ok=True)  # it is to have another end
        executor = _executor(sweep, OmegaConf.to_container(OmegaConf.create(asked)))
        try:
            submitted = executor.map_array(job.run, [str(sweep)] * len(some), some)
        except (FailedJobError, FailedSubmissionError) as error:
            raise LaunchError(f"sbatch did not take the jobs: {error}") from None
        ids |= {num: one.job_id for num, one in zip(some, submitted, strict=True)}
        for entry in said["jobs"]:
            entry["job_id"] = ids.get(entry["num"], entry["job_id"])
        write_sweep(sweep, said)
    return ids


def _executor(sweep: Path, asked: Any) -> Any:
    import submitit

    if submitit.SlurmExecutor.affinity() <= 0:
        raise LaunchError(
            "launcher=slurm needs Slurm's commands, and srun is not on the PATH: submit from a login node of "
            "the cluster, or run here by launcher=local"
        )
    executor = submitit.SlurmExecutor(folder=sweep / "slurm")
    executor.update_parameters(**asked)
    return executor


def _show(sweep: Path, jobs: dict[int, FrozenJob], more: dict[str, Any]) -> None:
    """Print what would be submitted: the script of the first job, and every job's overrides."""
    first = next(iter(jobs.values()))
    executor = _executor(sweep, sbatch.parameters(first.config, more, sweep))
    if len(jobs) > 1:
        executor.parameters["map_count"] = len(jobs)
    print(executor._make_submission_file_text(executor._submitit_command_str, "dry_run"))
    for num, one in jobs.items():
        print(f"# job {num}: {' '.join(one.overrides)}")


def _and_more(which: list[str]) -> str:
    return f" and {len(which) - 1} more" if len(which) > 1 else ""


def _returned(frozen: FrozenJob, end: watch.End, ends: dict[int, watch.End]) -> JobReturn:
    """What a sweeper gets of a job. Every failed one carries the words on all: Hydra raises the first's."""
    if end.error is None:
        return JobReturn(frozen.overrides, _cfg(frozen), status=JobStatus.COMPLETED, _return_value=end.result)
    failed = [f"{one.name} failed: {one.error}\n    log: {one.log}" for one in ends.values() if one.error]
    error = LaunchError("\n".join([f"{len(failed)} of {len(ends)} jobs failed", *failed]))
    return JobReturn(frozen.overrides, _cfg(frozen), status=JobStatus.FAILED, _return_value=error)


def _cfg(frozen: FrozenJob) -> DictConfig:
    return OmegaConf.structured(frozen.config)
