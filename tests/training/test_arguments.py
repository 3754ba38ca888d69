"""TRL's arguments: what is wrong is answered before anything starts, what is good is not checked twice."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from gymexp import config as configuration
from gymexp.config import CONF_DIR, EnvConfig, ModelConfig, RunConfig, SearchConfig, options
from gymexp.errors import ConfigError
from gymexp.training import arguments

ROOT = Path(__file__).parent.parent.parent


def config(**trainer) -> RunConfig:
    env = EnvConfig(config_path="c", agent="a")
    return RunConfig(model=ModelConfig("m", "p", dtype="float32"), env={"e": env}, trainer=trainer)


@pytest.fixture
def no_subprocess(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a subprocess was started")

    monkeypatch.setattr(subprocess, "run", refuse)


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        (
            {"learning_rat": 1e-6},
            r"\.learning_rat is not an argument of trl\.GRPOConfig; did you mean trainer\.learning_rate\?",
        ),
        ({"output_dir": "x"}, r"trainer\.output_dir is set by gymexp: use output_dir"),
        ({"use_vllm": True}, r"trainer\.use_vllm is set by gymexp: use engine instead"),
        ({"save_total_limit": 2}, r"trainer\.save_total_limit is set by gymexp: use checkpoint\.keep_last"),
        ({"report_to": "wandb"}, r"trainer\.report_to is set by gymexp: use tracker instead"),
        (
            {"num_generations": 6, "per_device_train_batch_size": 16},
            r"num_generations=6 must divide the generation batch of 16 .*, or a batch of 12 or 18",
        ),
        (
            {"num_generations": 8, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
            r"must divide the generation batch of 6 .*3 x steps_per_generation=2.*or a batch of 8",
        ),
        ({"num_generations": 1}, r"trainer\.num_generations must be >= 2 .*got 1"),
    ],
)
def test_names_and_groups_are_checked_without_importing_trl(trainer, said, tmp_path, no_subprocess):
    with pytest.raises(ConfigError, match=said):
        arguments.check(config(**trainer), tmp_path)


def test_what_a_study_may_try_is_checked_before_its_first_trial(tmp_path, no_subprocess):
    params = {"num_generations": [4, 8, 16], "learning_rate": {"low": 1e-6, "high": 1e-4}}
    search = SearchConfig(num_trials=4, trial=1, params={"trainer": params})
    trial = dataclasses.replace(config(per_device_train_batch_size=8), search=search)
    said = r"search\.params allow trainer\.num_generations=16, .*: trainer\.num_generations=16 must divide"
    with pytest.raises(ConfigError, match=said):
        arguments.check(trial, tmp_path)
    params["num_generatons"] = params.pop("num_generations")
    with pytest.raises(ConfigError, match=r"num_generatons is not .*did you mean trainer\.num_generations"):
        arguments.check(trial, tmp_path)


def test_all_wrong_names_come_in_one_message(tmp_path, no_subprocess):
    with pytest.raises(ConfigError) as caught:
        arguments.check(config(seed=1, learning_rat=1, epsilom=2), tmp_path)
    assert len(str(caught.value).splitlines()) == 3


def test_every_name_that_trl_knows_is_known():
    """Read from the sources; a new version of TRL that moves its fields elsewhere shows here."""
    names = arguments._known_names()
    assert {"num_generations", "beta", "learning_rate", "max_steps", "save_steps", "temperature"} <= names
    assert not [name for name in names if name.startswith("_")]


@pytest.fixture
def constructed_by(monkeypatch):
    """Stands in for the process that constructs GRPOConfigs; says what it was asked each time."""
    asked: list[list[dict]] = []

    def make(code: int = 0, verdict: str = "", stderr: str = "") -> list[list[dict]]:
        def run(command, input, **_):
            asked.append(json.loads(input))
            stdout = "a library's own words\n" + json.dumps([verdict] * len(asked[-1]))
            return subprocess.CompletedProcess(command, code, "" if code else stdout, stderr)

        monkeypatch.setattr(subprocess, "run", run)
        return asked

    return make


def test_a_good_verdict_is_kept_for_the_same_values_and_versions(tmp_path, constructed_by):
    asked = constructed_by()
    for _ in range(2):
        arguments.check(config(learning_rate=1e-6), tmp_path)
    assert len(asked) == 1
    arguments.check(config(learning_rate=2e-6), tmp_path)
    assert len(asked) == 2


def test_a_bad_verdict_is_not_kept_and_says_what_trl_said(tmp_path, constructed_by):
    asked = constructed_by(verdict="trainer: trl.GRPOConfig refuses it: The loss type is none")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^trainer: trl.GRPOConfig refuses it: The loss type is none$"):
            arguments.check(config(loss_type="none"), tmp_path)
    assert len(asked) == 2


def test_many_configurations_are_asked_about_at_once_and_the_same_values_once(tmp_path, constructed_by):
    asked = constructed_by(verdict="no")
    rates = [config(learning_rate=rate) for rate in (1e-6, 2e-6, 1e-6)]
    told = arguments.problems([*rates, config(seed=1)], tmp_path)
    assert told[:3] == ["no"] * 3 and "trainer.seed is set by gymexp" in told[3]
    assert [[one["trainer"]["learning_rate"] for one in some] for some in asked] == [[1e-6, 2e-6]]


def test_a_constructor_that_breaks_shows_the_end_of_what_it_said(tmp_path, constructed_by):
    constructed_by(1, stderr="x" * 5000 + "ImportError: no kernel")
    with pytest.raises(ConfigError, match="could not be constructed") as caught:
        arguments.check(config(), tmp_path)
    assert str(caught.value).endswith("ImportError: no kernel")
    assert len(str(caught.value)) < 2500


def test_trl_itself_takes_the_good_and_every_experiment_and_refuses_the_bad(tmp_path, monkeypatch):
    """TRL's constructor takes the words and types of the last five as they are, and fails minutes later."""
    said = {
        "": {"learning_rate": 1e-6, "num_generations": 4, "scale_rewards": False, "beta": 0},
        "cosinus is not a valid SchedulerType": {"lr_scheduler_type": "cosinus"},
        "'generation_batch_size' and 'steps_per_generation'": {
            "steps_per_generation": 2,
            "generation_batch_size": 16,
        },
        "trainer.loss_type must be one of bnpo, ": {"loss_type": "grop"},
        "trainer.scale_rewards must be one of batch, group, none, got 'gruop'": {"scale_rewards": "gruop"},
        "trainer.learning_rate must be of type float, got '1e-6x'": {"learning_rate": "1e-6x"},
        "trainer.max_steps must be of type int, got 'ten'": {"max_steps": "ten"},
        "trainer.num_generations must be of type int | None, got True": {"num_generations": True},
    }
    configuration.register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = [compose("train", [f"experiment={name}"]) for name in options("experiment")]
    configs = [configuration.load(cfg) for cfg in composed]
    asked = [*said.values(), *(one.trainer for one in configs)]
    same = {"dtype": "float32", "attn_implementation": "sdpa", "here": True}
    told = arguments._construct_elsewhere([{"trainer": one} | same for one in asked])
    for line, start in zip(told, said, strict=False):
        assert start in line and bool(start) == bool(line)
    assert told[len(said) :] == [""] * len(configs)
    monkeypatch.setattr(arguments, "_construct_elsewhere", lambda some: [""] * len(some))
    assert arguments.problems(configs, tmp_path) == [""] * len(configs), "names, and whole groups"
