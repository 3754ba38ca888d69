"""The life of one evaluation, from its configuration to its results: first all checks, then the
controller."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from gymexp import files
from gymexp.cluster.placement import Placement, place_evaluation, place_text_policy, visible_gpus
from gymexp.cluster.slurm_job import Allocation
from gymexp.config.evaluate_schema import EvaluateConfig
from gymexp.config.load import from_yaml
from gymexp.config.schema import RunConfig
from gymexp.config.suggestions import nearest
from gymexp.data.cache import Say
from gymexp.data.mix import keys_sha256
from gymexp.data.prepare import Prepared, load_prepared, prepare, write_prepared
from gymexp.engine import vllm
from gymexp.errors import ConfigError, RunDirectoryError
from gymexp.evaluation import results
from gymexp.evaluation.plan import TASKS, Plan, fingerprint, task_hashes, tasks_of, weights_digest
from gymexp.evaluation.request import Request, is_plain, resolve, settled
from gymexp.files import replace_file
from gymexp.gateway import prompt_lengths, tokenizer_check
from gymexp.gym.definitions import ensure_environments
from gymexp.gym.install import site_packages
from gymexp.gym.server_settings import check_variables
from gymexp.processes import launcher_variables, open_files
from gymexp.processes.module_call import call_module
from gymexp.record.directory import RunDirectory
from gymexp.record.places import cache_dir
from gymexp.rollout.outcome import Task
from gymexp.run import controller, work
from gymexp.view.progress import View

_COMMAND = "evaluate"
_WRITING_S = 3600.0


@files.as_gymexp_errors()
def evaluate(
    config: EvaluateConfig,
    cfg: DictConfig,
    overrides: Sequence[str],
    directory: Path | None = None,
    allocation: Allocation | None = None,
) -> Path:
    """Plays an evaluation, or with `config.resume` what is missing of one. Prints its table, and returns its
    directory.

    cfg: Hydra's composed config, of which `config` is made. overrides: those of the command line. directory:
    of a new evaluation that is a job; None: as configured. allocation: the Slurm job, if this evaluation is
    all that the job does. Raises GymexpError if the evaluation cannot start, fails or is ended by a signal.
    """
    open_files.raise_limit()
    view = View()
    for remark in launcher_variables.remarks():
        view.say(remark)
    run, request = None, None
    if config.resume:
        run = RunDirectory.reopen(Path(config.resume).expanduser().resolve(), _COMMAND)
        plan, run_config = Plan.read(run.path), from_yaml(run.config)
        _check_same(run, plan, run_config)
    else:
        request = settled(resolve(config, cfg, overrides), view.say)
        plan, run_config = request.plan, request.config
    check_key(plan)
    open_files.concurrency(run_config.env)
    check_variables(run_config.env)
    is_text = plan.policies[0].is_text
    placement = place_text_policy() if is_text else place_evaluation(run_config, visible_gpus())
    if placement.engine == "vllm":
        vllm.read_version(run_config.engine)
    python = ensure_environments(run_config.gym, run_config.env, cache_dir(), view.say, not is_text)
    if run is None:
        assert request is not None
        prepared = _prepare(request, config, python, view.say)
        run = RunDirectory.claim(directory or _directory(config, run_config), _COMMAND)
        plan, run_config = _write(run, request, prepared, overrides, view.say)
    _play(run, run_config, plan, placement, python, view, allocation)
    table = results.write(run, run_config, plan)
    view.say(table)
    view.say(f"evaluation directory: {run.path}")
    return run.path


def _directory(config: EvaluateConfig, run_config: RunConfig) -> Path:
    """Returns the directory of a new evaluation."""
    now = f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"
    return Path(config.output_dir or Path("outputs", "eval", run_config.name, now)).expanduser().resolve()


def check_key(plan: Plan) -> None:
    """Raises ConfigError if the variable that has an endpoint's key is not set."""
    if plan.endpoint and (name := plan.endpoint.key_env) and not os.environ.get(name):
        raise ConfigError(
            f"endpoint.key_env={name} must name an environment variable that is set: "
            f"read -rs {name}; export {name}"
        )


def _check_same(run: RunDirectory, plan: Plan, config: RunConfig) -> None:
    """Raises RunDirectoryError if what decides the results is no longer as when the evaluation began."""
    policies = [
        dataclasses.replace(policy, digest=weights_digest(Path(policy.directory)))
        if policy.directory and not config.model.revision
        else policy
        for policy in plan.policies
    ]
    now = fingerprint(config, dataclasses.replace(plan, policies=policies), tasks_of(load_prepared(run.data)))
    differing = [key for key in (plan.fingerprint | now) if plan.fingerprint.get(key) != now.get(key)]
    if differing:
        raise RunDirectoryError(
            f"{run.path} cannot be resumed, as its results would be of two kinds: since it began, "
            f"{', '.join(differing)} changed. Put them back, or begin anew"
        )


def _prepare(request: Request, config: EvaluateConfig, python: Path, say: Say) -> Prepared:
    """Returns the tasks to play, as the part of a run's data that has their split."""
    run_config = request.config
    if request.run:
        all_tasks = load_prepared(request.run.data)
    else:
        all_tasks = prepare(run_config, python, cache_dir(), say)
        first = request.plan.policies[0]
        if not first.is_text:
            model = run_config.model
            if request.made_by and not is_plain(Path(first.directory or "")):
                model = from_yaml(request.made_by.config).model  # the checkpoint has its weights alone
            tokenizer_check.check(model, all_tasks, cache_dir())
            prompt_lengths.check(model, all_tasks, cache_dir())
    envs = list(run_config.env)
    if config.split == "train":
        unique = {task.key: task for task in all_tasks.train}
        by_env = {
            env: sorted((t for t in unique.values() if t.env == env), key=lambda t: t.key) for env in envs
        }
    else:
        by_env = {env: all_tasks.validation[env] for env in envs}
    by_env = _chosen(by_env, config.evaluation.tasks, run_config.evaluation.num_tasks)
    if not any(by_env.values()):
        raise ConfigError(f"split={config.split} must have tasks, but has none")
    train = [task for tasks in by_env.values() for task in tasks] if config.split == "train" else []
    validation = {env: [] if train else tasks for env, tasks in by_env.items()}
    return Prepared(train, validation, {"sha256": keys_sha256(train), "envs": {env: {} for env in envs}})


def _chosen(
    by_env: dict[str, list[Task]], keys: Sequence[str], num_tasks: int | None
) -> dict[str, list[Task]]:
    """Returns the tasks with these keys, or without keys the first `num_tasks` of each environment."""
    if not keys:
        return {env: tasks[:num_tasks] for env, tasks in by_env.items()}
    known = [task.key for tasks in by_env.values() for task in tasks]
    for key in keys:
        if key not in known:
            raise ConfigError(f"evaluation.tasks: {key} is no task of this split{nearest(key, known)}")
    return {env: [task for task in tasks if task.key in keys] for env, tasks in by_env.items()}


def _write(
    run: RunDirectory, request: Request, prepared: Prepared, overrides: Sequence[str], say: Say
) -> tuple[Plan, RunConfig]:
    """Writes what a resumed evaluation needs, config.yaml last. Returns the plan and the configuration, with
    the directories in which the policies are whole models."""
    config, tasks = request.config, tasks_of(prepared)
    policies = request.plan.policies
    for index, policy in enumerate(policies):
        if policy.directory and request.made_by and not is_plain(Path(policy.directory)):
            say(f"{policy.label}: making a whole model of its checkpoint")
            to = run.path / "policies" / policy.file
            made = _whole_model(request.made_by.path, Path(policy.directory), to)
            digest = weights_digest(Path(made))
            policies[index] = dataclasses.replace(policy, directory=made, digest=digest)
    if (directory := policies[0].directory) and not config.model.revision:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=directory))
    plan = dataclasses.replace(request.plan, policies=policies)
    plan = dataclasses.replace(plan, fingerprint=fingerprint(config, plan, tasks))
    write_prepared(prepared, run.data)
    replace_file(run.path / TASKS, json.dumps(task_hashes(tasks), indent=1) + "\n")
    plan.write(run.path)
    run.describe(config, overrides)
    return plan, config


def _whole_model(run: Path, checkpoint: Path, to: Path) -> str:
    """Makes a model directory of an adapter's or a sharded checkpoint, in a process of its own."""
    to.parent.mkdir(exist_ok=True)
    arguments = ["gymexp.evaluation.whole_model", run, checkpoint, to]
    return call_module(arguments, f"making a model of {checkpoint}", _WRITING_S)


def _play(
    run: RunDirectory,
    config: RunConfig,
    plan: Plan,
    placement: Placement,
    python: Path,
    view: View,
    allocation: Allocation | None,
) -> None:
    """Plays all policies: in one start of the processes, but with vLLM in one start for each, as vLLM starts
    from a policy's directory."""
    site, numbers = site_packages(python), list(range(len(plan.policies)))
    starts = [[number] for number in numbers] if placement.engine == "vllm" else [numbers]
    with view:
        for start in starts:
            directory = plan.policies[start[0]].directory
            model = config.model
            if directory and not model.revision:
                model = dataclasses.replace(model, path=directory)
            doing = work.evaluation(start, _text_policy(plan))
            played = dataclasses.replace(config, model=model)
            controller.run(played, run, python, site, placement, view, allocation, work=doing)


def _text_policy(plan: Plan) -> tuple[str, ...]:
    """Returns the arguments of the text gateway; none if the policies give token ids."""
    if endpoint := plan.endpoint:
        key = ("--key-env", endpoint.key_env) if endpoint.key_env else ()
        timeout = ("--timeout-s", str(endpoint.timeout_s))
        return ("--url", endpoint.url, "--model", endpoint.model, *timeout, *key)
    return ("--probe",) if plan.policies[0].kind == "probe" else ()
