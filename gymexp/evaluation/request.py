"""Finds what an evaluation is asked to play: the policies, and the run whose tasks and configuration it
takes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from gymexp.config.evaluate_load import keys_of, of_model, of_run
from gymexp.config.evaluate_schema import EvaluateConfig
from gymexp.config.load import from_yaml
from gymexp.config.schema import RunConfig
from gymexp.errors import ConfigError, RunDirectoryError
from gymexp.evaluation.plan import EndpointPlan, Plan, Policy, weights_digest
from gymexp.policy import hub_snapshot
from gymexp.record.directory import PLAN, RunDirectory, is_whole
from gymexp.training import checkpoints

Say = Callable[[str], None]
REPLIES = ("empty", "prompt", "yes", "refusal", "digits")  # of `gateway/probe.py`


@dataclass(frozen=True)
class Request:
    """config: the evaluation's config.yaml. plan: without a fingerprint, and without the digests of weights,
    yet. run: the run whose tasks are played; None if the environments' own are made or fetched. made_by: the
    run that trained the policies; None if no run of gymexp's did."""

    config: RunConfig
    plan: Plan
    run: RunDirectory | None
    made_by: RunDirectory | None = None


@dataclass(frozen=True)
class _Weights:
    """A directory with a policy: of a run's step, with its label in tables."""

    directory: Path
    step: int
    label: str


def resolve(config: EvaluateConfig, cfg: DictConfig, overrides: Sequence[str]) -> Request:
    """Returns the request, before `settled`. Reads few files, and asks no hub.

    cfg: Hydra's composed config of `config`. overrides: those of the command line. Raises ConfigError or
    RunDirectoryError that names what is missing.
    """
    if config.checkpoint:
        _check_is_checkpoint(_located(config.checkpoint))
    if config.run or (config.checkpoint and _run_of(_located(config.checkpoint))):
        return _of_run(config, cfg, overrides)
    run_config = of_model(config)
    if config.policy:
        policies = [
            Policy("probe", f"probe: {reply}", f"eval-{number:06d}", digest=reply, reply=reply)
            for number, reply in enumerate(REPLIES)
        ]
        return Request(_named(run_config, "probe", config), _plan(config, policies), None)
    if config.endpoint.url:
        endpoint = EndpointPlan(**dataclasses.asdict(config.endpoint))
        policy = Policy(
            "endpoint", endpoint.model, "eval-000000", digest=f"{endpoint.model} at {endpoint.url}"
        )
        return Request(
            _named(run_config, endpoint.model.replace("/", "_"), config),
            dataclasses.replace(_plan(config, [policy]), endpoint=endpoint),
            None,
        )
    if config.checkpoint:
        directory = _plain(_located(config.checkpoint))
        model = dataclasses.replace(run_config.model, path=str(directory), name=directory.name)
        run_config = _named(dataclasses.replace(run_config, model=model), directory.name, config)
    model = run_config.model
    policy = Policy("model", model.name, "eval-000000", 0, hub_snapshot.resolve_path(model.path))
    return Request(_named(run_config, model.name, config), _plan(config, [policy]), None)


def settled(request: Request, say: Say) -> Request:
    """Returns the request with the digest of each policy's weights. A hub id is fetched, and pinned to its
    commit. Raises ConfigError if the hub has no such model."""
    if request.plan.policies[0].is_text:
        return request
    model, policies = request.config.model, request.plan.policies
    if not Path(policies[0].directory or "").is_absolute():
        model = hub_snapshot.pin(model, say)
        directory = str(hub_snapshot.directory_of(model, say))
        digest = f"{model.path}@{model.revision}"
        policies = [dataclasses.replace(policies[0], directory=directory, digest=digest)]
    else:
        if not request.made_by:
            hub_snapshot.pin(model, say)  # which refuses a revision of a directory
        policies = [
            dataclasses.replace(policy, digest=weights_digest(Path(policy.directory or "")))
            for policy in policies
        ]
    return dataclasses.replace(
        request,
        config=dataclasses.replace(request.config, model=model),
        plan=dataclasses.replace(request.plan, policies=policies),
    )


def _check_is_checkpoint(directory: Path) -> None:
    """Raises ConfigError for a directory that is a run's, or that does not exist and is of no run."""
    if (directory / "config.yaml").exists():
        raise ConfigError(f"checkpoint must be a checkpoint, but {directory} is a run: say run={directory}")
    if not directory.is_dir() and not _run_of(directory):
        raise ConfigError(f"checkpoint must be a directory that exists, got {directory}")


def _plan(config: EvaluateConfig, policies: list[Policy]) -> Plan:
    return Plan(policies, config.evaluation.samples, config.split)


def _named(run_config: RunConfig, name: str, config: EvaluateConfig) -> RunConfig:
    return dataclasses.replace(run_config, name=config.name or name)


def _of_run(config: EvaluateConfig, cfg: DictConfig, overrides: Sequence[str]) -> Request:
    checkpoint = _located(config.checkpoint) if config.checkpoint else None
    path = _run_of(checkpoint) if checkpoint else Path(config.run or "").expanduser().resolve()
    assert path is not None
    run = RunDirectory(path)
    if not run.config.exists():
        what = "has no config.yaml" if path.is_dir() else "does not exist"
        raise RunDirectoryError(f"run must name the directory of a run, but {path} {what}")
    if (path / PLAN).exists():
        raise RunDirectoryError(
            f"run must name the directory of a training run, but {path} is an evaluation: say the run that "
            "it evaluated, or compare=[…] for its results"
        )
    trained = from_yaml(run.config)
    has_envs = "env" in keys_of(overrides)
    run_config = of_run(trained, cfg, overrides, data_of_run=not has_envs)
    chosen = [_of_checkpoint(run, checkpoint)] if checkpoint else _choose(run, config.checkpoints, trained)
    policies = [
        Policy(
            "model",
            weights.label,
            f"eval-{weights.step:06d}",
            weights.step,
            str(weights.directory),
        )
        for weights in chosen
    ]
    model = dataclasses.replace(run_config.model, path=policies[0].directory or "", revision=None)
    named = _named(dataclasses.replace(run_config, model=model), trained.name, config)
    return Request(named, _plan(config, policies), None if has_envs else run, run)


def _located(checkpoint: str) -> Path:
    """Returns the absolute path of a checkpoint without links, but one of a run below that run, also if the
    run's `checkpoints/` or `model/` is a link to another disk."""
    path = Path(os.path.abspath(Path(checkpoint).expanduser()))
    real = path.resolve()
    if _run_of(real) or not (run := _run_of(path)):
        return real
    name = real.name if real.parent == path.parent.resolve() else path.name  # `best` is a link beside it
    return run.resolve() / path.parent.relative_to(run) / name


def _run_of(checkpoint: Path) -> Path | None:
    """Returns the run that a checkpoint, or a model/ or adapter/, is of; None for another directory."""
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return run if (run / "config.yaml").exists() and (run / "data").is_dir() else None


def _choose(run: RunDirectory, which: object, trained: RunConfig) -> list[_Weights]:
    """Returns the policies of a run that `checkpoints=…` names, oldest first."""
    found = {
        step: path for step, path in checkpoints.all_of(run.checkpoints).items() if checkpoints.whole(path)
    }
    by_step = {step: _Weights(path, step, f"step {step}") for step, path in found.items()}
    if which == "final" and (weights := _final(run)):
        return [weights]
    if which == "all":
        if (weights := _final(run)) and weights.step not in by_step:
            by_step[weights.step] = weights
        if by_step:
            return [by_step[step] for step in sorted(by_step)]
    if not found:
        raise RunDirectoryError(f"{run.path} has no whole checkpoint to evaluate yet")
    if which in ("final", "last"):
        return [by_step[max(by_step)]]
    if which == "best":
        ranked = checkpoints.best(found, checkpoints.read_scores(run.metrics, list(trained.env)))
        if not ranked:
            raise RunDirectoryError(
                f"checkpoints=best needs held-out rewards at the steps of checkpoints, and {run.path} has "
                "none: say checkpoints=last or all"
            )
        return [by_step[ranked[0]]]
    assert isinstance(which, list)
    if missing := [step for step in which if step not in by_step]:
        known = ", ".join(map(str, by_step))
        raise RunDirectoryError(
            f"checkpoints must be steps that {run.path} has whole checkpoints of ({known}), got "
            + ", ".join(map(str, missing))
        )
    return [by_step[step] for step in sorted(set(which))]


def _final(run: RunDirectory) -> _Weights | None:
    """Returns the policy in a finished run's model/."""
    result = run.read_result()
    if not is_whole(result) or not (run.path / "model" / "config.json").exists():
        return None
    return _Weights(run.path / "model", result["step"], f"step {result['step']}")


def _of_checkpoint(run: RunDirectory, checkpoint: Path) -> _Weights:
    if checkpoint == run.path / "model" and (weights := _final(run)):
        return weights
    if checkpoint.parent != run.checkpoints or not checkpoint.name.startswith("checkpoint-"):
        raise ConfigError(
            f"checkpoint must be a checkpoint-N of {run.checkpoints}, or {run.path / 'model'} of a finished "
            f"run, got {checkpoint}"
        )
    if not checkpoint.is_dir():
        known = ", ".join(map(str, sorted(checkpoints.all_of(run.checkpoints)))) or "none"
        raise RunDirectoryError(
            f"checkpoint must be a directory that exists, got {checkpoint}: the run has checkpoints of the "
            f"steps {known}"
        )
    if damage := checkpoints.damage(checkpoint):
        raise RunDirectoryError(f"checkpoint={checkpoint} must be whole, but {damage}")
    step = checkpoints.step_of(checkpoint)
    return _Weights(checkpoint, step, f"step {step}")


def is_plain(directory: Path) -> bool:
    """Returns whether a directory has a whole model in Hugging Face's form."""
    names = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    return (directory / "config.json").is_file() and any((directory / name).is_file() for name in names)


def _plain(directory: Path) -> Path:
    if not is_plain(directory):
        raise ConfigError(
            "checkpoint must be a checkpoint of a run, or a directory with config.json and weights, got "
            f"{directory}"
        )
    return directory
