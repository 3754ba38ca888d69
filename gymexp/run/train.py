"""The life of one run, from its configuration to its result: first all checks, then the controller."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymexp import files
from gymexp.cluster.slurm_job import Allocation
from gymexp.config.load import resumed
from gymexp.config.schema import RunConfig
from gymexp.record.optuna_study import as_trial

if TYPE_CHECKING:
    from gymexp.cluster.placement import Placement
    from gymexp.record.directory import RunDirectory


@as_trial
@files.as_gymexp_errors()
def train(
    config: RunConfig, overrides: Sequence[str], directory: Path, allocation: Allocation | None = None
) -> dict[str, Any]:
    """Starts a new run in `directory`, or with `config.resume` continues the run in `directory`.

    overrides: those of the command line. allocation: the Slurm job, if this run is all that the job does.
    Returns the content of the run's result.json. Raises GymexpError if the run cannot start or fails.
    """
    from gymexp.cluster.placement import num_nodes, place, visible_gpus
    from gymexp.data.prepare import load_prepared, prepare, write_prepared
    from gymexp.engine import vllm
    from gymexp.gateway import prompt_lengths, tokenizer_check
    from gymexp.gym.definitions import ensure_environments
    from gymexp.gym.install import site_packages
    from gymexp.gym.server_settings import check_variables
    from gymexp.policy import hub_snapshot
    from gymexp.processes import launcher_variables, open_files
    from gymexp.record.directory import RunDirectory
    from gymexp.record.places import cache_dir
    from gymexp.run import controller, placement_trial
    from gymexp.training import arguments, checkpoints, schedule, sharding
    from gymexp.view.progress import View

    open_files.raise_limit()
    view = View()
    for remark in launcher_variables.remarks():
        view.say(remark)
    run = RunDirectory.reopen(directory) if config.resume else None
    checkpoint = None
    if run:
        config = resumed(run.config, str(run.path), overrides)
        if run.is_finished(config.trainer.get("max_steps")):
            view.say(f"{run.path} is finished; to train on: resume={run.path} trainer.max_steps=…")
            return run.read_result()
        checkpoint = checkpoints.latest(run.checkpoints, view.say)
    num_tasks = len(load_prepared(run.data).train) if run else None
    in_flight = open_files.concurrency(config.env)
    check_variables(config.env)
    arguments.check(config, cache_dir())
    if tries := config.engine.colocate == "auto":
        config = placement_trial.apart(config)
        placement_trial.shared(config, visible_gpus())  # refuses what cannot be divided
    # With several nodes, the checks assume that every node has the same GPUs as this one; the controller
    # places the processes again once the other nodes have joined and reported their GPUs.
    placement = place(config, [visible_gpus()] * num_nodes(config.placement))
    sharding.check(config, placement)
    schedule.check(config, placement.num_ranks, num_tasks)
    if placement.engine == "vllm" and not config.engine.urls:
        vllm.read_version(config.engine)
    python = ensure_environments(config.gym, config.env, cache_dir(), view.say)
    site = site_packages(python)
    if run is None:
        prepared = prepare(config, python, cache_dir(), view.say)
        training_plan = schedule.plan(config, placement.num_ranks, prepared.train)
        view.say(schedule.describe(training_plan, len(prepared.train)))
        for remark in schedule.remarks(config, training_plan, prepared.train, in_flight):
            view.say(remark)
        prepared.summary["training"] = training_plan
        config = dataclasses.replace(config, model=hub_snapshot.pin(config.model, view.say))
        config = _fit_to_model(config, hub_snapshot.directory_of(config.model), placement, view.say)
        tokenizer_check.check(config.model, prepared, cache_dir())
        prompt_lengths.check(config.model, prepared, cache_dir())
        run = RunDirectory.claim(directory)
        write_prepared(prepared, run.data)
        if tries:
            config = placement_trial.decided(config, visible_gpus(), run, prepared, view.say)
            placement = place(config, [visible_gpus()])
        run.describe(config, overrides)
    else:
        config = _fit_to_model(config, hub_snapshot.directory_of(config.model, view.say), placement, view.say)
        run.go_on_with(config, overrides)
    with view:
        result = controller.run(config, run, python, site, placement, view, allocation, checkpoint)
    if result["held_out"]:
        view.say(_held_out(result, run, view.say))
    view.say(f"run directory: {run.path}")
    return result


def _held_out(result: dict[str, Any], run: RunDirectory, say: Callable[[str], None]) -> str:
    """Returns the table of the held-out rewards before and after training."""
    from gymexp.report.held_out import read_held_out
    from gymexp.view.table import held_out_table

    try:
        held_out = read_held_out(run.rollouts)
    except OSError as error:  # the run is finished, whatever can be read of it
        held_out = {}
        say(f"no intervals, as the index of the rollouts cannot be read: {error}")
    return held_out_table(result, held_out)


def _fit_to_model(
    config: RunConfig, directory: Path, placement: Placement, say: Callable[[str], None]
) -> RunConfig:
    """Returns the configuration with `model.packing=auto` decided. Raises ConfigError if the model in
    `directory` cannot do what the configuration asks of it."""
    from gymexp.engine import adapter
    from gymexp.training import argument_rules, packing_rules

    if config.model.packing == "auto":
        packing, why_none = packing_rules.chosen(config, directory, placement.num_train_gpus > 0)
        if why_none:
            say(f"rollouts are trained as padded rows (model.packing): {why_none}")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, packing=packing))
    packing_rules.check(config.model, directory)
    argument_rules.check_model(config.trainer, directory)
    adapter.check(config.model, directory, placement.engine, placement.num_train_gpus > 0)
    return config
