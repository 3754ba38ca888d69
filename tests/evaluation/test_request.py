"""What an evaluation is asked to play: each mistake names what is wrong and what there is instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from whole_run import TINY

from gymexp.config import hydra_schema
from gymexp.config.evaluate_load import load_evaluation, register
from gymexp.config.group_options import CONF_DIR
from gymexp.config.load import to_yaml
from gymexp.config.schema import DataConfig, EnvConfig, ModelConfig, RunConfig
from gymexp.errors import GymexpError
from gymexp.evaluation.request import Request, resolve
from gymexp.training import checkpoints


def resolved(*overrides: str) -> Request:
    register()
    hydra_schema.register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("evaluate", list(overrides))
    return resolve(load_evaluation(cfg, overrides), cfg, list(overrides))


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with the checkpoints of steps 2 and 4, and without a result yet."""
    data = DataConfig("jsonl", train_file="t", validation_file="v")
    env = EnvConfig("c.yaml", "a", data=data)
    config = RunConfig("r", model=ModelConfig("tiny", str(TINY)), env={"e": env})
    path = tmp_path / "run"
    (path / "data").mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    for step in (2, 4):
        checkpoint = path / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_text(str(step))
        checkpoints.seal(checkpoint)
    return path


def test_a_runs_checkpoints_are_chosen_by_name_or_step(run):
    for which, steps in (("final", [4]), ("last", [4]), ("all", [2, 4]), ("[2]", [2])):
        found = resolved(f"run={run}", f"checkpoints={which}").plan.policies
        assert [policy.step for policy in found] == steps
    with (run / "metrics.jsonl").open("w") as file:
        for step, reward in ((0, 0.1), (2, 0.9), (4, 0.5)):
            file.write(json.dumps({"step": step, "eval_e/reward": reward}) + "\n")
    assert [policy.step for policy in resolved(f"run={run}", "checkpoints=best").plan.policies] == [2]


def test_the_launcher_is_the_evaluations_and_not_the_runs(run):
    found = resolved(f"run={run}", "launcher=slurm", "launcher.partition=gpu", "launcher.gpus=2")
    assert (found.config.launcher.partition, found.config.launcher.gpus) == ("gpu", 2)
    assert found.run is not None and found.made_by is not None


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["run={run}/none"], r"run must name the directory of a run, but .*none does not exist"),
        (["run={run}/data"], r"run must name the directory of a run, but .*data has no config.yaml"),
        (["run={run}", "checkpoints=[3]"], r"whole checkpoints of \(2, 4\), got 3"),
        (["run={run}", "checkpoints=best"], "checkpoints=best needs held-out rewards"),
        (["checkpoint={run}"], r"checkpoint must be a checkpoint, but .*run is a run: say run="),
        (["checkpoint={run}/checkpoints/checkpoint-9"], r"must be a directory that exists.* steps 2, 4"),
        (["checkpoint=/none"], "checkpoint must be a directory that exists, got /none"),
    ],
)
def test_what_is_not_there_is_named(run, overrides, told):
    with pytest.raises(GymexpError, match=told):
        resolved(*(override.format(run=run) for override in overrides))


def test_an_evaluation_is_no_run_to_evaluate(run):
    (run / "evaluation.json").write_text("{}")
    with pytest.raises(
        GymexpError, match=r"run must name the directory of a training run, but .* is an evalu"
    ):
        resolved(f"run={run}")


@pytest.mark.parametrize("name", ["checkpoint-2", "best"])
def test_a_checkpoint_is_its_runs_also_if_the_runs_checkpoints_lie_on_another_disk(run, tmp_path, name):
    (run / "checkpoints" / "best").symlink_to("checkpoint-2")
    here = resolved(f"checkpoint={run}/checkpoints/{name}")
    (run / "checkpoints").rename(tmp_path / "big")
    (run / "checkpoints").symlink_to(tmp_path / "big")
    there = resolved(f"checkpoint={run}/checkpoints/{name}")
    assert (there.plan, there.config) == (here.plan, here.config) and there.plan.policies[0].step == 2
    assert there.run and there.made_by and there.run.path == there.made_by.path == run
