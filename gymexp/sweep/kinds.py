"""What the jobs of a sweep are: runs of `gymexp.train`, or evaluations of `gymexp.evaluate`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gymexp.cluster.placement import num_nodes, place, place_evaluation
from gymexp.cluster.slurm_job import Allocation
from gymexp.config.evaluate_load import keys_of, load_evaluation, refuse_launcher_keys
from gymexp.config.load import load
from gymexp.config.schema import RunConfig
from gymexp.errors import ConfigError
from gymexp.evaluation.kept import num_scored
from gymexp.evaluation.request import resolve
from gymexp.evaluation.results import RESULTS, read_table
from gymexp.gym.server_settings import check_variables
from gymexp.record.directory import RunDirectory, is_whole
from gymexp.record.places import cache_dir
from gymexp.run.evaluate import check_key, evaluate
from gymexp.run.train import train
from gymexp.sweep.freeze import FrozenJob
from gymexp.training import arguments, schedule
from gymexp.training.checkpoints import newest_step


class Kind(ABC):
    """A kind of jobs. advice: what gets a job further that is started again and again."""

    advice: str

    @abstractmethod
    def frozen(self, cfg: DictConfig, overrides: list[str]) -> FrozenJob:
        """Returns the job of a composed configuration. Raises GymexpError if it cannot start."""

    @abstractmethod
    def check_local(self, job: FrozenJob) -> None:
        """Raises ConfigError for a job that only launcher=local refuses."""

    @abstractmethod
    def problems(self, jobs: Sequence[FrozenJob]) -> list[str]:
        """Returns each job's problem that `frozen` has not looked for, or an empty text."""

    @abstractmethod
    def has_engine(self, job: FrozenJob) -> bool:
        """Returns whether the job samples with an engine of gymexp's, and so with GPUs where it has some."""

    @abstractmethod
    def check_gpus(self, job: FrozenJob, gpus: list[str]) -> None:
        """Raises ConfigError if the job cannot use these GPUs of each node."""

    @abstractmethod
    def is_done(self, directory: RunDirectory) -> bool:
        """Returns whether nothing is left to do."""

    @abstractmethod
    def do(self, job: FrozenJob, directory: RunDirectory, allocation: Allocation | None) -> dict[str, Any]:
        """Starts what the job does, or goes on with what is in its directory. Returns result.json's content.
        Raises GymexpError."""

    @abstractmethod
    def progress(self, directory: RunDirectory) -> int | None:
        """Returns how far the job has come that a new start would keep; None if nothing is kept."""

    @abstractmethod
    def describe(self, progress: int | None) -> str:
        """Returns a progress as the end of "was started 3 times …"."""

    @abstractmethod
    def going_on(self, directory: RunDirectory) -> str:
        """Returns how the next start of the job goes on."""

    @abstractmethod
    def shown_at_end(self, directory: RunDirectory) -> str:
        """Returns what the submitter shows of a finished job beside its state; may be empty."""


class _Training(Kind):
    advice = (
        "give it more time (launcher.time), more time to save (launcher.signal_s), or let it save more often "
        "(trainer.save_steps)"
    )

    def frozen(self, cfg: DictConfig, overrides: list[str]) -> FrozenJob:
        config = load(cfg)
        _refuse(dataclasses.asdict(config), ("output_dir", "resume"))
        if not config.launcher.setup:  # which may set the variables in the job
            check_variables(config.env)
        return FrozenJob(config, overrides)

    def check_local(self, job: FrozenJob) -> None:
        refuse_dry_run(job.config)

    def problems(self, jobs: Sequence[FrozenJob]) -> list[str]:
        of_arguments = arguments.problems([job.config for job in jobs], cache_dir())
        return [text or _too_few_tasks(job.config) for text, job in zip(of_arguments, jobs, strict=True)]

    def has_engine(self, job: FrozenJob) -> bool:
        return True

    def check_gpus(self, job: FrozenJob, gpus: list[str]) -> None:
        place(job.config, [gpus] * num_nodes(job.config.placement))

    def is_done(self, directory: RunDirectory) -> bool:
        return is_whole(directory.read_result())

    def do(self, job: FrozenJob, directory: RunDirectory, allocation: Allocation | None) -> dict[str, Any]:
        config, overrides = job.config, job.overrides
        if directory.config.exists():
            config, overrides = dataclasses.replace(config, resume=str(directory.path)), []
        return train(config, overrides, directory.path, allocation)

    def progress(self, directory: RunDirectory) -> int | None:
        return newest_step(directory.checkpoints)

    def describe(self, progress: int | None) -> str:
        if progress is None:
            return "before its first checkpoint"
        return f"without getting past checkpoint-{progress}"

    def going_on(self, directory: RunDirectory) -> str:
        step = self.progress(directory)
        return "begins anew" if step is None else f"goes on from checkpoint-{step}"

    def shown_at_end(self, directory: RunDirectory) -> str:
        return ""


class _Evaluations(Kind):
    advice = "give it more time (launcher.time)"

    def frozen(self, cfg: DictConfig, overrides: list[str]) -> FrozenJob:
        _refuse(cfg, ("output_dir", "resume"))
        if cfg.compare:
            raise ConfigError(
                "compare must not be set in a sweep or with launcher=slurm, as it plays nothing: say it alone"
            )
        config = load_evaluation(cfg, overrides)
        request = resolve(config, cfg, overrides)
        if not config.launcher.setup:  # which may set the variable in the job
            check_key(request.plan)
            check_variables(request.config.env)
        run_config = request.config
        if request.plan.policies[0].is_text and "launcher.gpus" not in keys_of(overrides):
            # The machine's file may ask for GPUs, which the job would leave idle.
            run_config.launcher = dataclasses.replace(run_config.launcher, gpus=None)
        plain: Any = OmegaConf.to_container(cfg, resolve=False)
        return FrozenJob(run_config, overrides, plain)

    def check_local(self, job: FrozenJob) -> None:
        refuse_launcher_keys(job.overrides)

    def problems(self, jobs: Sequence[FrozenJob]) -> list[str]:
        return [""] * len(jobs)

    def has_engine(self, job: FrozenJob) -> bool:
        assert job.evaluation is not None
        return not (job.evaluation["policy"] or job.evaluation["endpoint"]["url"])

    def check_gpus(self, job: FrozenJob, gpus: list[str]) -> None:
        place_evaluation(job.config, gpus)

    def is_done(self, directory: RunDirectory) -> bool:
        return (directory.path / RESULTS).exists()  # with vLLM each policy has a result.json of its own

    def do(self, job: FrozenJob, directory: RunDirectory, allocation: Allocation | None) -> dict[str, Any]:
        cfg = OmegaConf.create(job.evaluation)
        assert isinstance(cfg, DictConfig)
        config = load_evaluation(cfg, job.overrides)
        if directory.config.exists():
            config = dataclasses.replace(config, resume=str(directory.path))
        evaluate(config, cfg, job.overrides, directory.path, allocation)
        return directory.read_result()

    def progress(self, directory: RunDirectory) -> int | None:
        return num_scored(directory.path) or None

    def describe(self, progress: int | None) -> str:
        if progress is None:
            return "before its first rollout was scored"
        return f"without scoring more than {progress} rollouts"

    def going_on(self, directory: RunDirectory) -> str:
        scored = self.progress(directory)
        return "begins anew" if scored is None else f"goes on after {scored} scored rollouts"

    def shown_at_end(self, directory: RunDirectory) -> str:
        return f"{read_table(directory.path)}\nevaluation directory: {directory.path}"


TRAINING, EVALUATIONS = _Training(), _Evaluations()


def kind_of(job: FrozenJob) -> Kind:
    """Returns what the job is."""
    return TRAINING if job.evaluation is None else EVALUATIONS


def refuse_dry_run(config: RunConfig) -> None:
    """Raises ConfigError if launcher.dry_run is set with launcher=local, which would start the run."""
    if config.launcher.dry_run:
        raise ConfigError(
            "launcher.dry_run shows what launcher=slurm would submit, got launcher=local: say launcher=slurm "
            "as well, or --cfg job for the configuration"
        )


def _refuse(config: Any, keys: Sequence[str]) -> None:
    if refused := [key for key in keys if config.get(key) is not None]:
        raise ConfigError(
            f"{refused[0]} must not be set in a sweep or with launcher=slurm: say hydra.sweep.dir=… for the "
            "directory of the jobs; resume those that ended early by: python -m gymexp.sweep resubmit DIR"
        )


def _too_few_tasks(config: RunConfig) -> str:
    """Returns the error if the tasks are too few even for one training process, else an empty text.

    A study's trial is checked when it starts, as the study may choose its batch size.
    """
    try:
        if config.search.trial is None:
            schedule.check(config, num_ranks=1)
    except ConfigError as error:
        return str(error)
    return ""
