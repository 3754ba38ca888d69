"""The rules of the mix's keys: what is refused, and how it is said; what is read back as it was."""

from __future__ import annotations

import re

import pytest
from hydra import compose, initialize_config_dir

from gymexp.config.group_options import CONF_DIR
from gymexp.config.hydra_schema import register
from gymexp.config.load import from_yaml, load, to_yaml
from gymexp.config.schema import RunConfig
from gymexp.data.weights import Weights
from gymexp.errors import ConfigError

TWO = "env=[sudoku,workplace]"
SCHEDULE = "dataset.schedule={0:{sudoku:1,workplace:0},100:{sudoku:1,workplace:.5}}"


def loaded(*overrides: str) -> RunConfig:
    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return load(compose("train", overrides=[TWO, *overrides]))


def test_a_schedule_is_read_from_the_command_line_and_from_the_runs_own_file(tmp_path):
    config = loaded(SCHEDULE, "dataset.sampling=difficulty")
    assert config.dataset.schedule == {0: {"sudoku": 1, "workplace": 0}, 100: {"sudoku": 1, "workplace": 0.5}}
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "config.yaml") == config
    assert float(Weights.of(config).at(50)["workplace"]) == 0.25
    assert loaded("env.sudoku.replicas=auto").env["sudoku"].replicas == "auto"
    assert loaded().dataset.schedule == {} and loaded().dataset.sampling == "uniform"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "dataset.schedule={0:{sudoku:1,workplac:1}}",
            r"dataset.schedule.0.workplac must be of a selected environment \(sudoku, workplace\).*: add it",
        ),
        (
            "dataset.schedule={0:{sudoku:1,workplace:1},9:{sudoku:-1,workplace:1}}",
            r"dataset.schedule.9.sudoku must be a number >= 0, got -1",
        ),
        ("dataset.schedule={0:{sudoku:much,workplace:1}}", r"0.sudoku must be a number >= 0, got 'much'"),
        ("dataset.schedule={0:{sudoku:nan,workplace:1}}", r"0.sudoku must be a finite number, got nan"),
        ("dataset.schedule={0:{sudoku:true,workplace:1}}", r"0.sudoku must be a number >= 0, got True"),
        (
            "dataset.schedule={0:{sudoku:1,workplace:1},5:{sudoku:0,workplace:0}}",
            r"dataset.schedule.5 must have a weight > 0 for at least one environment, got 0 for all",
        ),
        (
            "dataset.schedule={0:{sudoku:0}} env.workplace.weight=0",
            r"dataset.schedule.0 must have a weight > 0 for at least one",
        ),
        (
            "dataset.schedule={-1:{sudoku:1}}",
            r"must have numbers of steps >= 0 as its keys, got -1: write e\.g\.",
        ),
        (
            "dataset.schedule.5.sudoku=1",
            r"must have numbers of steps >= 0 as its keys, got '5': write e\.g\.",
        ),
        ("dataset.schedule={0.5:{sudoku:1}}", r"numbers of steps >= 0 as its keys, got 0.5"),
        ("dataset.schedule={true:{sudoku:1}}", r"numbers of steps >= 0 as its keys, got True"),
        ("dataset.schedule={0:1}", r"dataset.schedule.0 must have a weight for each environment, got 1"),
        ("dataset.schedule={0:{}}", r"dataset.schedule.0 must have a weight for each environment, got {}"),
        (
            "dataset.schedule={0:{sudoku:1},9:{sudoku:1,workplace:1}}",
            r"must name the same environments at every step, got 0: sudoku; 9: sudoku, workplace: add the",
        ),
        (
            "dataset.schedule={0:{sudoku:1}} env.sudoku.weight=2",
            r"env.sudoku.weight must be left out where dataset.schedule has weights of sudoku, got 2.0",
        ),
        (
            "dataset.schedule={0:{sudoku:1}} dataset.train_size=9",
            r"dataset.train_size must be left out with dataset.schedule, .*, got 9: env.<name>.data",
        ),
        (
            "dataset.sampling=difficulty dataset.order=shuffle",
            r"dataset.order must be interleave with dataset.sampling=difficulty, got 'shuffle'",
        ),
        ("env.sudoku.replicas=many", r"env.sudoku.replicas must be a whole number or auto, got 'many'"),
        ("env.sudoku.replicas=1.5", r"env.sudoku.replicas must be a whole number or auto, got 1.5"),
        ("env.sudoku.replicas=null", r"env.sudoku.replicas must be a whole number or auto, got None"),
        (
            "env.sudoku.replicas=auto gym.runtime=attach gym.policy_port=9",
            r"env.sudoku.replicas must be a number with gym.runtime=attach, .*, got 'auto'",
        ),
        (
            "dataset.sampling=dificulty",
            r"dataset.sampling must be one of uniform, difficulty, got 'dificulty'.*difficulty",
        ),
    ],
)
def test_a_mistake_is_answered_by_key_rule_value_and_fix(overrides, message):
    with pytest.raises(ConfigError) as error:
        loaded(*overrides.split())
    assert re.search(message, str(error.value)), error.value
