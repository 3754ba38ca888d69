"""`launcher=slurm`: every job of a sweep composed, checked and frozen, then submitted as one array.

Hydra's submitit launcher, but for two things: its jobs read configuration and code when they start, and it
learns how they are from `sacct` alone. Here a job runs what was there at submission.
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

from gymexp.cluster.placement import num_nodes, place
from gymexp.config.schema import RunConfig
from gymexp.errors import ConfigError, LaunchError
from gymexp.record.directory import RunDirectory
from gymexp.sweep import job, sbatch, watch
from gymexp.sweep.check import check_jobs, returns
from gymexp.sweep.freeze import FrozenJob, freeze, read_job, read_sweep, take_back, write_sweep


class SlurmLauncher(submitit_launcher.SlurmLauncher):
    """Under the name of the class it replaces (`gymexp.cli.entry`), so that its configuration is the same."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit one job a list of overrides, and wait for all. Raises GymexpError before anything is
        submitted."""
        assert self.config is not None
        sweep = Path(str(self.config.hydra.sweep.dir)).resolve()
        more = sbatch.extras(self.params)
        try:
            jobs = check_jobs(self, job_overrides, initial_job_idx, lambda config: _fits(config, more))
            if next(iter(jobs.values())).config.launcher.dry_run:
                _show(sweep, jobs, more)
                raise SystemExit(0)
            freeze(sweep, "slurm", jobs, more)
            if next(iter(jobs.values())).config.launcher.gpus is None and not sbatch.asks_for_gpus(more):
                print("launcher.gpus is not set: the jobs ask Slurm for no GPU", flush=True)
            submit(sweep, list(jobs))
        except BaseException:
            take_back(sweep, range(initial_job_idx, initial_job_idx + len(job_overrides)))
            raise
        return returns(jobs, watch.wait(sweep, list(jobs)))


def _fits(config: RunConfig, more: Mapping[str, Any]) -> None:
    """Raises ConfigError where what is asked of Slurm cannot be what the run needs. more: `sbatch.extras`."""
    gpus, engine = config.launcher.gpus, config.engine
    given = engine.urls or sbatch.asks_for_gpus(more)
    if gpus is not None:
        place(config, [[str(gpu) for gpu in range(gpus)]] * num_nodes(config.placement))
    elif engine.kind == "vllm" and not given:
        raise ConfigError(
            "launcher.gpus must say how many GPUs of each node a job gets with engine=vllm, got None, which "
            "asks Slurm for none: say e.g. launcher.gpus=2, or 0 for vLLM on CPUs"
        )


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
        asked = sbatch.parameters(read_job(sweep / str(num)).config, said["sbatch"], sweep, said["cwd"])
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
    """Print what would be submitted: the script of the first job, and every job's overrides. Asks Slurm
    nothing, and so works where there is none."""
    from submitit.slurm.slurm import _make_sbatch_string

    asked = sbatch.parameters(next(iter(jobs.values())).config, more, sweep, str(Path.cwd()))
    if len(jobs) > 1:
        asked["map_count"] = len(jobs)
    folder = sweep / "slurm"
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    print(_make_sbatch_string(command=command, folder=folder, **asked))
    for num, one in jobs.items():
        print(f"# job {num}: {' '.join(one.overrides)}")
