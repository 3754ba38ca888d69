"""Two steps of training with each argument that is carried out: what passes the first checks also trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_trainer import DEFAULTS, MadeUp, build_trainer, save_policy

from gymexp.training import argument_rules, argument_trial
from gymexp.training.argument_rules import CARRIED

VALUES: dict[str, tuple[Any, ...]] = {
    "per_device_train_batch_size": (4,),
    "gradient_accumulation_steps": (2,),
    "generation_batch_size": (16,),
    "steps_per_generation": (8,),
    "num_generations": (2,),
    "num_iterations": (2,),
    "max_steps": (3,),
    "num_train_epochs": (1,),
    "learning_rate": (1e-4,),
    "lr_scheduler_type": ("linear", "cosine", "polynomial", "inverse_sqrt", "cosine_with_restarts"),
    "warmup_steps": (1, 0.5),
    "optim": ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    "weight_decay": (0.1,),
    "adam_beta1": (0.8,),
    "adam_beta2": (0.9,),
    "adam_epsilon": (1e-6,),
    "max_grad_norm": (1.0,),
    "temperature": (0.7,),
    "loss_type": ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo"),
    "scale_rewards": (True, False, "group", "batch", "none"),
    "multi_objective_aggregation": ("normalize_then_sum",),
    "importance_sampling_level": ("sequence",),
    "epsilon": (0.1,),
    "epsilon_high": (0.3,),
    "delta": (2.0,),
    "beta": (0.1,),
    "top_entropy_quantile": (0.5,),
    "entropy_coef": (0.01,),
    "off_policy_mask_threshold": (0.5,),
    "disable_dropout": (True,),
    "gradient_checkpointing": (True,),
    "torch_empty_cache_steps": (1,),
    "ddp_find_unused_parameters": (True,),
    "logging_strategy": ("epoch", "no"),
    "logging_steps": (2, 0.5),
    "logging_first_step": (True,),
    "logging_nan_inf_filter": (False,),
    "log_on_each_node": (False,),
    "log_level": ("debug",),
    "log_level_replica": ("error",),
    "include_num_input_tokens_seen": (True, "all", "non_padding"),
    "skip_memory_metrics": (False,),
    "debug": ("underflow_overflow",),
    "log_completions": (True,),
    "save_strategy": ("steps", "epoch"),
    "accelerator_config": (
        {"non_blocking": True},
        {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    ),
}
DECOUPLED = {"correction": "decoupled"}
TOGETHER: tuple[dict[str, Any], ...] = (
    {"loss_type": "dr_grpo", "max_completion_length": 8},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1}},
    {"optim": "sgd", "optim_args": "momentum=0.9"},
    {"beta": 0.1, "use_bias_correction_kl": True},
    {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.01,
        "entropy_target": 0.5,
        "entropy_coef_min": 0.001,
        "entropy_coef_max": 0.1,
        "entropy_coef_delta": 0.001,
    },
    {"loss_type": "sapo", "sapo_temperature_neg": 1.1, "sapo_temperature_pos": 1.2},
    DECOUPLED
    | {
        "loss_type": "vespo",
        "vllm_importance_sampling_mode": "token_mask",
        "vespo_k_pos": 1.5,
        "vespo_lambda_pos": 2.5,
        "vespo_k_neg": 2.5,
        "vespo_lambda_neg": 1.5,
    },
    *(
        DECOUPLED | {"vllm_importance_sampling_mode": f"{of}_{how}"}
        for of in ("token", "sequence")
        for how in ("truncate", "mask")
    ),
    DECOUPLED | {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.1},
    DECOUPLED | {"vllm_importance_sampling_clip_max": 3.0},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}},
    {"torch_compile": True, "torch_compile_backend": "eager"},
    {"log_completions": True, "num_completions_to_print": 1, "log_unique_prompts": True},
    {"save_strategy": "steps", "save_steps": 0.5},
)
ELSEWHERE = {
    "optim_target_modules": "a package of GaLore's or APOLLO's",
    "router_aux_loss_coef": "a mixture of experts",
    "use_liger_kernel": "a GPU and a package",
    "liger_kernel_config": "a GPU and a package",
    "torch_compile_mode": "a compiler, half a minute",
    "tf32": "a GPU",
    "fsdp": "several ranks: test_sharding",
    "fsdp_config": "several ranks: test_sharding",
    "deepspeed": "several ranks: test_sharding",
    "ddp_bucket_cap_mb": "several ranks",
    "ddp_broadcast_buffers": "several ranks",
    "ddp_static_graph": "several ranks",
    "ddp_backend": "several ranks",
    "ddp_timeout": "several ranks",
    "trackio_space_id": "trackio: test_tracker",
    "trackio_bucket_id": "trackio: test_tracker",
    "trackio_static_space_id": "trackio: test_tracker",
}
SETTINGS = [{name: value} for name, values in VALUES.items() for value in values] + list(TOGETHER)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


def test_every_argument_that_is_carried_out_is_here_or_has_a_reason():
    tried = {name for one in SETTINGS for name in one} - {"correction"}
    assert tried | set(ELSEWHERE) == CARRIED and not tried & set(ELSEWHERE)


@pytest.mark.grid
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: ",".join(f"{k}={v}" for k, v in one.items()))
def test_two_steps_train_with_it(policy, tmp_path, settings):
    defaults = {"max_steps": 2, "learning_rate": 1e-3} | settings
    own = {name: value for name, value in defaults.items() if name != "correction"}
    trainer = {name: value for name, value in DEFAULTS.items() if name != "max_completion_length"} | own
    if settings == {"num_train_epochs": 1}:
        trainer["max_steps"] = defaults["max_steps"] = -1
    assert list(argument_rules.problems(trainer)) == []
    assert argument_trial.judge(trainer, "float32", "sdpa", here=True) == ""
    made = build_trainer(policy, tmp_path, MadeUp(own_logprobs=True), **defaults)
    before = [parameter.detach().clone() for parameter in made.model.parameters()]
    made.train()
    assert made.state.global_step == made.state.max_steps > 0
    assert any((old != new).any() for old, new in zip(before, made.model.parameters(), strict=True))
