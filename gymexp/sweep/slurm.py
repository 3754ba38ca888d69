"""`launcher=slurm`: composes, checks and freezes every job of a sweep, then submits them as job arrays.

It differs from Hydra's submitit launcher in two ways. A job of Hydra's reads configuration and code when it
starts; a job of gymexp runs those of its submission. Hydra's launcher reads job states from `sacct` alone;
gymexp also reads `squeue` and the runs' files (`gymexp.sweep.watch`).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from omegaconf import OmegaConf

from gymexp.errors import ConfigError, LaunchError
from gymexp.printable import say
from gymexp.record.directory import RunDirectory
from gymexp.sweep import job, sbatch, watch
from gymexp.sweep.check import check_jobs, returns
from gymexp.sweep.freeze import FrozenJob, freeze, read_job, read_sweep, take_back, write_sweep
from gymexp.sweep.kinds import Kind


class SlurmLauncher(submitit_launcher.SlurmLauncher):
    """The launcher that replaces Hydra's class of this name (`gymexp.cli.entry`); its keys are the same."""

    def __init__(self, kind: Kind, **params: Any) -> None:
        super().__init__(**params)
        self._kind = kind

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit one job for each list of overrides, and wait until all have ended.

        Raises GymexpError before any submission if a job is wrong, and LaunchError if sbatch refuses the jobs
        or jobs fail. Exits with 0 after showing a dry run.
        """
        assert self.config is not None
        sweep = Path(str(self.config.hydra.sweep.dir)).resolve()
        extra_flags = sbatch.extras(self.params)
        try:
            check_gpus = lambda job: _check_gpus(self._kind, job, extra_flags)  # noqa: E731
            jobs = check_jobs(self, job_overrides, initial_job_idx, self._kind, check_gpus)
            if next(iter(jobs.values())).config.launcher.dry_run:
                _show(sweep, jobs, extra_flags)
                raise SystemExit(0)
            freeze(sweep, "slurm", jobs, extra_flags)
            first = next(iter(jobs.values()))
            gpus = first.config.launcher.gpus is not None or sbatch.asks_for_gpus(extra_flags)
            if self._kind.has_engine(first) and not gpus:
                print("launcher.gpus is not set: the jobs ask Slurm for no GPU", flush=True)
            submit(sweep, list(jobs))
        except BaseException:
            take_back(sweep, range(initial_job_idx, initial_job_idx + len(job_overrides)))
            raise
        ends = watch.wait(sweep, list(jobs))
        for num, end in ends.items():
            if not end.error and (text := self._kind.shown_at_end(RunDirectory(sweep / str(num)))):
                say(text)
        return returns(jobs, ends)


def _check_gpus(kind: Kind, job: FrozenJob, extra_flags: Mapping[str, Any]) -> None:
    """Raises ConfigError if the GPUs that the job asks of Slurm do not fit what it does. extra_flags: from
    `sbatch.extras`."""
    if not kind.has_engine(job):
        return
    gpus, engine = job.config.launcher.gpus, job.config.engine
    has_gpus_or_urls = engine.urls or sbatch.asks_for_gpus(extra_flags)
    if gpus is not None:
        kind.check_gpus(job, [str(gpu) for gpu in range(gpus)])
    elif engine.kind == "vllm" and not has_gpus_or_urls:
        raise ConfigError(
            "launcher.gpus must say how many GPUs of each node a job gets with engine=vllm, got None, which "
            "asks Slurm for none: say e.g. launcher.gpus=2, or 0 for vLLM on CPUs"
        )


def submit(sweep: Path, nums: Sequence[int]) -> dict[int, str]:
    """Submit jobs of a frozen sweep, for the first time or again. Returns their Slurm ids by number.

    A job whose directory has a run continues that run. Jobs with the same sbatch parameters become one array.
    Raises LaunchError with sbatch's error if sbatch refuses the jobs.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    sweep = sweep.resolve()
    record = read_sweep(sweep)
    arrays: dict[str, list[int]] = {}
    for num in nums:
        config = read_job(sweep / str(num)).config
        parameters = sbatch.parameters(config, record["sbatch"], sweep, record["cwd"])
        arrays.setdefault(OmegaConf.to_yaml(OmegaConf.create(parameters)), []).append(num)
    ids: dict[int, str] = {}
    for parameters_yaml, array in arrays.items():
        for num in array:
            # An old result must not pass for this submission's.
            RunDirectory(sweep / str(num)).result.unlink(missing_ok=True)
        executor = _executor(sweep, OmegaConf.to_container(OmegaConf.create(parameters_yaml)))
        try:
            submitted = executor.map_array(job.run, [str(sweep)] * len(array), array)
        except (FailedJobError, FailedSubmissionError) as error:
            raise LaunchError(f"sbatch did not take the jobs: {error}") from None
        ids |= {num: slurm_job.job_id for num, slurm_job in zip(array, submitted, strict=True)}
        for entry in record["jobs"]:
            entry["job_id"] = ids.get(entry["num"], entry["job_id"])
        write_sweep(sweep, record)
    return ids


def _executor(sweep: Path, parameters: Any) -> Any:
    """Returns submitit's executor for the sweep. Raises LaunchError if this machine has no srun."""
    import submitit

    if submitit.SlurmExecutor.affinity() <= 0:
        raise LaunchError(
            "launcher=slurm needs Slurm's commands, and srun is not on the PATH: submit from a login node of "
            "the cluster, or run here by launcher=local"
        )
    executor = submitit.SlurmExecutor(folder=sweep / "slurm")
    executor.update_parameters(**parameters)
    return executor


def _show(sweep: Path, jobs: dict[int, FrozenJob], extra_flags: dict[str, Any]) -> None:
    """Print the sbatch script of the first job, and every job's overrides. Runs no Slurm command, so that a
    dry run works on any machine."""
    from submitit.slurm.slurm import _make_sbatch_string

    parameters = sbatch.parameters(next(iter(jobs.values())).config, extra_flags, sweep, str(Path.cwd()))
    if len(jobs) > 1:
        parameters["map_count"] = len(jobs)
    folder = sweep / "slurm"
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    print(_make_sbatch_string(command=command, folder=folder, **parameters))
    for num, frozen in jobs.items():
        print(f"# job {num}: {' '.join(frozen.overrides)}")
