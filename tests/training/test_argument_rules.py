"""The table of trl.GRPOConfig's arguments: complete, and true to what the installed TRL has."""

from __future__ import annotations

import dataclasses
import subprocess
from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3MoeConfig

from gymexp.cluster.placement import Placement, Share
from gymexp.config.schema import EnvConfig, ModelConfig, RunConfig, SearchConfig
from gymexp.errors import ConfigError
from gymexp.run.train import _fit_to_model
from gymexp.training import argument_rules, arguments

TABLES: dict[str, Any] = {
    "carried": argument_rules.CARRIED,
    "owned": argument_rules.OWNED,
    "refused": argument_rules.REFUSED,
    "harmless": argument_rules.HARMLESS,
}
ON_A_CPU = Placement("hf", [Share(0, [])], [])
OTHER = {bool: True, int: 3, float: 0.123, str: "other", dict: {"a": 1}, list: ["other"], type(None): "other"}


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    """Every argument that the installed GRPOConfig's constructor takes, with its default."""
    from trl.trainer.grpo_config import GRPOConfig

    return {
        field.name: field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(GRPOConfig)
        if field.init
    }


def test_every_argument_of_trl_stands_in_exactly_one_table_and_no_other_name_does(defaults):
    where = {name: [table for table, names in TABLES.items() if name in names] for name in defaults}
    assert {name: tables for name, tables in where.items() if len(tables) != 1} == {}
    assert {name for names in TABLES.values() for name in names} - set(defaults) == set()


def test_what_trl_itself_sets_is_never_refused(defaults):
    """A neutral value that is not TRL's default would refuse what TRL does anyway."""
    assert {
        name: r.neutral[0] for name, r in argument_rules.REFUSED.items() if r.neutral[0] != defaults[name]
    } == {}
    plain = {
        name: defaults[name]
        for name in argument_rules.CARRIED | argument_rules.REFUSED.keys() | argument_rules.HARMLESS.keys()
    }
    assert list(argument_rules.problems(plain)) == []


@pytest.mark.parametrize("name", argument_rules.REFUSED)
def test_another_value_than_the_neutral_one_is_refused_with_key_rule_value_and_fix(name):
    refusal = argument_rules.REFUSED[name]
    for neutral in refusal.neutral:
        assert list(argument_rules.problems({name: neutral})) == []
    first = refusal.neutral[0]
    other = not first if isinstance(first, bool) else OTHER[type(first)]
    [said] = argument_rules.problems({name: other})
    assert said.startswith(f"trainer.{name} must be {first!r} ")
    assert f"got {other!r}: " in said and said.endswith(refusal.instead)


@pytest.mark.parametrize("name", argument_rules.OWNED)
def test_what_gymexp_sets_is_refused_with_the_key_to_use(name, defaults):
    assert list(argument_rules.problems({name: defaults[name]})) == [
        f"trainer.{name} is set by gymexp: use {argument_rules.OWNED[name]} instead"
    ]


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"top_p": 0.95}, r"top_p must be 1\.0 in training \(.*\), got 0\.95: evaluation\.top_p="),
        ({"top_p": 0}, r"top_p must be 1\.0 .*got 0:"),
        ({"top_p": 1.5}, r"top_p must be 1\.0 .*got 1\.5:"),
        ({"top_k": 20}, r"top_k must be 0 in training .*got 20: evaluation\.top_k="),
        ({"min_p": 0.1}, r"min_p must be None in training .*got 0\.1"),
        ({"repetition_penalty": 1.2}, r"repetition_penalty must be 1\.0 in training .*got 1\.2"),
        (
            {"generation_kwargs": {"top_k": 5}},
            r"generation_kwargs must be None in training .*got \{'top_k': 5",
        ),
        ({"num_generations_eval": 4}, r"num_generations_eval must be None as each held-out task"),
        (
            {"reward_weights": [1, 2]},
            r"reward_weights must be None as a rollout has one reward.*got \[1, 2\]",
        ),
        ({"temperature": 0}, r"temperature must be between 0\.01 and 2 in training, got 0"),
        ({"temperature": -1.0}, r"temperature must be between"),
        ({"temperature": 0.001}, r"temperature must be between"),
        (
            {"mask_truncated_completions": True},
            r"mask_truncated_completions is set .*rollout\.truncated=masked",
        ),
        ({"per_device_eval_batch_size": 4}, r"per_device_eval_batch_size is set by gymexp"),
        ({"max_completion_length": 64}, r"max_completion_length .*env\.<name>\.max_output_tokens"),
        ({"max_completion_length": None, "loss_type": "dr_grpo"}, r"max_completion_length must be a number"),
        ({"max_steps": 0}, r"max_steps must be >= 1, or -1"),
        ({"max_steps": -5}, r"max_steps must be >= 1, or -1"),
        ({"num_train_epochs": 0}, r"num_train_epochs must be > 0"),
        ({"per_device_train_batch_size": 0}, r"per_device_train_batch_size must be >= 1, got 0"),
        ({"gradient_accumulation_steps": 0}, r"gradient_accumulation_steps must be >= 1"),
        ({"num_iterations": 0}, r"num_iterations must be >= 1"),
        ({"logging_steps": -1}, r"logging_steps must be > 0"),
        ({"top_entropy_quantile": 1.5}, r"top_entropy_quantile must be between 0 and 1"),
        ({"learning_rate": -1e-6}, r"learning_rate must be >= 0"),
        (
            {"save_strategy": "best"},
            r"save_strategy must be steps, epoch or no, got 'best': checkpoint\.keep_best",
        ),
        ({"sync_ref_model": True}, r"sync_ref_model must be false with trainer\.beta=0"),
        (
            {"torch_compile_mode": "max-autotune", "torch_compile_backend": "eager"},
            r"torch_compile_mode=max-autotune is for torch_compile_backend=inductor, .* got 'eager'",
        ),
        ({"optim": "lomo"}, r"optim must step once for all micro-batches"),
        ({"optim": "galore_adamw_layerwise"}, r"optim must step once"),
        ({"optim": "schedule_free_adamw"}, r"optim must train the weights that it leaves"),
        (
            {"optim_target_modules": "all-linear"},
            r"optim_target_modules is for .*got trainer\.optim='adamw_torch",
        ),
        ({"liger_kernel_config": {"rope": True}}, r"liger_kernel_config has no effect without"),
        (
            {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"every_n_layers": 2}},
            r"gradient_checkpointing_kwargs is for trainer.gradient_checkpointing=true, which is False here",
        ),
        ({"accelerator_config": {"split_batches": True}}, r"accelerator_config may have .*split_batches"),
        ({"accelerator_config": "config.json"}, r"accelerator_config may have"),
    ],
)
def test_values_that_break_or_bend_a_run_later_are_refused_at_the_start(trainer, said, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a subprocess was started")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(ConfigError, match=r"^trainer\." + said):
        arguments.check(config(trainer), tmp_path)


@pytest.mark.parametrize(
    "trainer",
    [
        {"max_completion_length": 64, "loss_type": "dr_grpo"},
        {"sync_ref_model": True, "beta": 0.01},
        {
            "accelerator_config": {
                "gradient_accumulation_kwargs": {"sync_each_batch": True},
                "non_blocking": True,
            }
        },
        {"optim": "galore_adamw", "optim_target_modules": ["q_proj"]},
        {"max_steps": -1, "num_train_epochs": 0.5},
        {"save_steps": 0, "max_grad_norm": 0, "learning_rate": 0},
        {"temperature": 0.01},
        {"reward_weights": [1.0]},
    ],
)
def test_values_that_mean_something_are_taken(trainer):
    assert list(argument_rules.problems(trainer)) == []


@pytest.mark.parametrize("trial", [None, 1])
def test_a_study_may_not_try_what_no_run_may_have(trial, tmp_path):
    for params, said in [
        ({"top_p": [0.9, 1.0]}, r"search\.params allow trainer\.top_p=0\.9: trainer\.top_p must be 1\.0"),
        ({"temperature": {"low": 0.0, "high": 1.0}}, r"search\.params allow trainer\.temperature=0\.0: "),
        ({"mask_truncated_completions": [True]}, r"mask_truncated_completions is set by gymexp"),
    ]:
        search = SearchConfig(num_trials=4, trial=trial, params={"trainer": params})
        with pytest.raises(ConfigError, match=said):
            arguments.check(dataclasses.replace(config({}), search=search), tmp_path)


def test_a_loss_of_experts_is_for_models_that_have_them(tmp_path):
    trainer = {"router_aux_loss_coef": 0.01}
    Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef must be left out .*\(qwen3\), got 0\.01"):
        _fit_to_model(config(trainer), tmp_path, ON_A_CPU, print)
    _fit_to_model(config({}), tmp_path, ON_A_CPU, print)
    Qwen3MoeConfig().save_pretrained(tmp_path)
    _fit_to_model(config(trainer), tmp_path, ON_A_CPU, print)


def test_a_tracker_that_is_not_trackio_has_no_space(tmp_path):
    with pytest.raises(ConfigError, match=r"trackio_space_id is for tracker=trackio, got tracker\.kind=none"):
        arguments.check(config({"trackio_space_id": "a/b"}), tmp_path)


def config(trainer: dict[str, Any]) -> RunConfig:
    env = EnvConfig(config_path="c", agent="a")
    return RunConfig(model=ModelConfig("m", "p", dtype="float32"), env={"e": env}, trainer=trainer)
