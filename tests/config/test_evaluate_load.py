"""An evaluation takes exactly one policy, and refuses by name what it would not obey."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from gymexp.cli.terminal import explain
from gymexp.config import hydra_schema
from gymexp.config.evaluate_load import load_evaluation, of_model, of_run, register
from gymexp.config.evaluate_schema import EvaluateConfig
from gymexp.config.group_options import CONF_DIR
from gymexp.config.load import load
from gymexp.errors import ConfigError


def composed(*overrides: str, name: str = "evaluate") -> DictConfig:
    register()
    hydra_schema.register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(name, list(overrides))


def loaded(*overrides: str):
    return load_evaluation(composed(*overrides), overrides)


ROOT = Path(__file__).parent.parent.parent
SUDOKU = ("env=[sudoku]", "model=tiny")
ENDPOINT = ("env=[sudoku]", "endpoint.url=http://127.0.0.1:1/v1", "endpoint.model=m")


@pytest.mark.parametrize(
    "overrides",
    [
        SUDOKU,
        ("env=[sudoku,workplace]", "model=tiny", "evaluation.samples=4", "split=train", "seed=3"),
        ("run=outputs/x", "checkpoints=[16,32]"),
        ("run=outputs/x", "checkpoints=best", "env=[sudoku]"),
        ("checkpoint=outputs/x/checkpoints/checkpoint-4", "evaluation.temperature=0"),
        (*ENDPOINT, "endpoint.key_env=OPENAI_API_KEY", "evaluation.top_p=0.9"),
        ("env=[sudoku]", "policy=probe", "evaluation.num_tasks=3"),
        ("compare=[a,b]",),
        ("resume=outputs/eval/x",),
    ],
)
def test_each_kind_of_evaluation_is_taken(overrides):
    loaded(*overrides)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("env=[sudoku]",), "exactly one policy must be named .*got none"),
        ((*SUDOKU, "run=x"), "got model and run"),
        ((*ENDPOINT, "policy=probe"), "got endpoint.url and policy"),
        (
            (*SUDOKU, "trainer.learning_rate=1e-5"),
            r"trainer\.learning_rate must be left out of gymexp\.evaluate",
        ),
        ((*SUDOKU, "model.lora.r=8"), r"model\.lora\.r must be left out"),
        ((*SUDOKU, "engine.urls=['http://x']"), r"engine\.urls must be left out.*endpoint\.url"),
        ((*SUDOKU, "rollout.drift_every=3"), r"rollout\.drift_every must be left out"),
        ((*SUDOKU, "evaluation.every_steps=3"), r"evaluation\.every_steps must be left out"),
        ((*SUDOKU, "env.sudoku.weight=3"), r"env\.sudoku\.weight must be left out"),
        (("model=tiny", "env.sudoku.timeout_s=3"), r"env\.sudoku is not among the selected"),
        ((*SUDOKU, "env.sudoku.tiemout_s=3"), r"env\.sudoku\.tiemout_s is not a known key"),
        ((*SUDOKU, "split=test"), "split must be validation or train, got 'test'"),
        ((*SUDOKU, "evaluation.samples=0"), "evaluation.samples must be >= 1, got 0"),
        ((*SUDOKU, "evaluation.num_tasks=3", "evaluation.tasks=[a]"), "both choose the tasks"),
        ((*SUDOKU, "checkpoints=all"), "checkpoints chooses among those of run"),
        (("run=x", "checkpoints=newest"), "checkpoints must be final, last, best, all"),
        ((*SUDOKU, "endpoint.timeout_s=3"), "endpoint.timeout_s is for endpoint.url"),
        ((*ENDPOINT[:2],), "endpoint.model must be"),
        (("env=[sudoku]", "endpoint.url=ftp://x", "endpoint.model=m"), "endpoint.url must be an address"),
        (
            ("env=[sudoku]", "endpoint.url=http://u:p@x/v1", "endpoint.model=m"),
            "endpoint.url must be an address",
        ),
        ((*ENDPOINT, "endpoint.key_env='a b'"), "must be the name of an environment variable, not the key"),
        ((*ENDPOINT, "engine=hf"), "engine must be left out with endpoint.url"),
        ((*ENDPOINT, "gym.runtime=attach"), "gym.runtime must be managed"),
        (("env=[sudoku]", "policy=parrot"), "policy must be probe, got 'parrot'"),
        (
            ("env=[sudoku]", "policy=probe", "evaluation.samples=3"),
            "evaluation.samples must be left out with policy",
        ),
        (("compare=[a,b]", "seed=3"), "compare stands alone, got also seed"),
        (("resume=x", "evaluation.samples=3"), "resume stands alone, got also evaluation.samples"),
    ],
)
def test_what_an_evaluation_would_not_obey_is_refused_by_name(overrides, told):
    with pytest.raises(ConfigError, match=told):
        of_model(loaded(*overrides))


def test_a_model_is_sampled_as_a_run_would_sample_it_first():
    config = of_model(loaded(*SUDOKU, "seed=7", "evaluation.num_tasks=5", "env.sudoku.max_output_tokens=33"))
    assert (config.seed, config.evaluation.temperature, config.evaluation.num_tasks) == (7, 1.0, 5)
    assert config.env["sudoku"].max_output_tokens == 33 and config.model.name == "tiny"
    with pytest.raises(ConfigError, match=r"evaluation\.top_p must be"):
        of_model(loaded(*SUDOKU, "evaluation.top_p=2"))


def trained(*overrides: str):
    return load(composed("env=[sudoku,workplace]", *overrides, name="train"))


def test_a_run_decides_how_its_policy_is_played_but_for_what_the_command_says():
    run = trained(
        *("seed=5", "trainer.temperature=0.7", "evaluation.top_p=0.8", "evaluation.num_tasks=9"),
        *("env.sudoku.max_output_tokens=44", "evaluation.every_steps=2", "checkpoint.keep_last=1"),
        "model.lora.r=4",
    )
    overrides = ("run=x", "evaluation.samples=4", "evaluation.top_p=0.5", "env.workplace.max_concurrency=3")
    config = of_run(run, composed(*overrides), overrides, data_of_run=True)
    assert (config.seed, config.evaluation.temperature, config.evaluation.top_p) == (5, 0.7, 0.5)
    assert config.evaluation.num_tasks == 9 and list(config.env) == ["sudoku", "workplace"]
    assert config.env["sudoku"].max_output_tokens == 44 and config.env["workplace"].max_concurrency == 3
    assert config.trainer == {} and config.model.lora.r is None and config.checkpoint.keep_last is None
    load(OmegaConf.create(dataclasses.asdict(config)))


@pytest.mark.parametrize(
    "key",
    ["model=tiny", "model.path=x", "dataset.seed=3", "env.sudoku.data.train_size=3", "env.sudoku.agent=x"],
)
def test_what_the_run_decides_is_refused(key):
    with pytest.raises(ConfigError, match="where the run decides it"):
        of_run(trained(), composed("run=x"), ("run=x", key), data_of_run=True)


def test_a_key_of_an_environment_that_the_run_lacks_is_refused():
    overrides = ("run=x", "env.chess.timeout_s=3")
    with pytest.raises(ConfigError, match="the run has no environment chess, but sudoku, workplace"):
        of_run(trained(), composed(*overrides), overrides, data_of_run=True)


def test_other_environments_than_the_runs_come_with_all_their_tasks():
    run = trained("evaluation.num_tasks=9", "trainer.temperature=0.7")
    overrides = ("run=x", "env=[sudoku]", "env.sudoku.data.validation_size=30")
    config = of_run(run, composed(*overrides), overrides, data_of_run=False)
    assert list(config.env) == ["sudoku"] and config.env["sudoku"].data.validation_size == 30
    assert config.evaluation.num_tasks is None and config.evaluation.temperature == 0.7


def recommended() -> list[str]:
    """What follows `python -m gymexp.evaluate` in the guide and in the command's help, but sweeps, which have
    several values."""
    texts = [ROOT / "docs" / "guides" / "evaluate.md", ROOT / "gymexp" / "evaluate.py"]
    text = "\n".join(path.read_text().replace("\\\n", " ") for path in texts)
    return sorted(
        set(
            re.findall(
                r"^python -m gymexp\.evaluate (?!-m )([^\n#]+?)(?: {2,}.*| *#.*)?$", text, re.MULTILINE
            )
        )
    )


def test_there_are_commands_to_look_at():
    assert len(recommended()) > 9


@pytest.mark.parametrize("command", recommended())
def test_each_command_that_is_recommended_is_taken(command):
    loaded(*shlex.split(re.sub(r"<\w+>|…", "x", command).replace("https://x/v1", "https://example.org/v1")))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("evaluation.samples=x", "evaluation.samples must be of type int, got 'x'"),
        ("evaluation.temperature=hot", "evaluation.temperature must be of type float, got 'hot'"),
        ("launcher.dry_run=maybe", "launcher.dry_run must be of type bool, got 'maybe'"),
    ],
)
def test_a_value_of_another_type_is_named_with_the_type(override, told):
    with pytest.raises(HydraException) as caught:
        composed(*SUDOKU, override)
    assert explain(caught.value, EvaluateConfig) == told
