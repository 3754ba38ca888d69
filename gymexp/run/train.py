"""One run, from its configuration to its result: first all checks, then the controller."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gymexp import files
from gymexp.cluster.job import Allocation
from gymexp.config.load import resumed
from gymexp.config.schema import RunConfig
from gymexp.record.study import as_trial


@as_trial
@files.told()
def train(
    config: RunConfig, overrides: Sequence[str], directory: Path, allocation: Allocation | None = None
) -> dict[str, Any]:
    """One run in `directory`: a new one, or with `config.resume` on with the one that it holds.

    overrides: what was said on the command line. allocation: the Slurm job that the run is all of.
    Returns what the run's result.json says.
    """
    from gymexp.cluster.placement import num_nodes, place, visible_gpus
    from gymexp.data.prepare import load_prepared, prepare, write_prepared
    from gymexp.engine import vllm
    from gymexp.gateway import first_prompts, inspection
    from gymexp.gym.install import ensure_python, site_packages
    from gymexp.policy import snapshot
    from gymexp.processes import environment, open_files
    from gymexp.record.directory import RunDirectory
    from gymexp.record.places import cache_dir
    from gymexp.run import controller
    from gymexp.training import arguments, checkpoints, schedule, sharding
    from gymexp.view.progress import View
    from gymexp.view.table import held_out_table

    open_files.raise_limit()
    view = View()
    for remark in environment.remarks():
        view.say(remark)
    held = RunDirectory.reopen(directory) if config.resume else None
    checkpoint = None
    if held:
        config = resumed(held.config, str(held.path), overrides)
        if held.is_finished(config.trainer.get("max_steps")):
            view.say(f"{held.path} is finished; to train on: resume={held.path} trainer.max_steps=…")
            return held.read_result()
        checkpoint = checkpoints.latest(held.checkpoints, view.say)
    trained = len(load_prepared(held.data).train) if held else None
    open_files.concurrency(config.env)
    arguments.check(config, cache_dir())
    # With several nodes, as if all had what this one has; what they do have is known once they are there.
    placement = place(config, [visible_gpus()] * num_nodes(config.placement))
    sharding.check(config, placement)
    schedule.check(config, placement.num_ranks, trained)
    if placement.engine == "vllm" and not config.engine.urls:
        vllm.read_version(config.engine)
    python = ensure_python(config.gym, [e.config_path for e in config.env.values()], cache_dir(), view.say)
    site = site_packages(python)
    if held is None:
        prepared = prepare(config, python, cache_dir(), view.say)
        training_plan = schedule.plan(config, placement.num_ranks, prepared.train)
        view.say(schedule.describe(training_plan, len(prepared.train)))
        prepared.summary["training"] = training_plan
        config = dataclasses.replace(config, model=snapshot.pin(config.model, view.say))
        inspection.check(config.model, prepared, cache_dir())
        first_prompts.check(config.model, prepared, cache_dir())
        held = RunDirectory.claim(directory)
        write_prepared(prepared, held.data)
        held.describe(config, overrides)
    else:
        snapshot.directory_of(config.model, view.say)
        held.go_on_with(config, overrides)
    with view:
        result = controller.run(config, held, python, site, placement, view, allocation, checkpoint)
    if result["held_out"]:
        view.say(held_out_table(result))
    view.say(f"run directory: {held.path}")
    return result
