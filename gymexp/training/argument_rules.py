"""What gymexp does with each argument of trl.GRPOConfig. Each argument is in one of four tables.

CARRIED: the argument has its usual effect, as TRL's trainer applies it in gymexp's subclass too. OWNED:
gymexp sets the argument; the table names the key to use instead. REFUSED: the argument must keep its neutral
value, because gymexp would ignore another value or apply it wrongly. HARMLESS: any value is accepted, because
nothing reads the argument and nobody is misled.

This module does not import TRL, so a mistake is reported at once. `check_model` looks at the model too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gymexp.config.grpo_arguments import default, value_of
from gymexp.errors import ConfigError

_CARRIED = {
    "steps and batches": (
        "per_device_train_batch_size gradient_accumulation_steps generation_batch_size steps_per_generation "
        "num_generations num_iterations num_train_epochs max_steps"
    ),
    "optimizer and schedule": (
        "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args "
        "optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm"
    ),
    "objective": (
        "temperature loss_type scale_rewards multi_objective_aggregation importance_sampling_level epsilon "
        "epsilon_high delta beta use_bias_correction_kl sync_ref_model ref_model_mixup_alpha "
        "ref_model_sync_steps top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min "
        "entropy_coef_max entropy_coef_delta entropy_target off_policy_mask_threshold sapo_temperature_neg "
        "sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg router_aux_loss_coef "
        "max_completion_length disable_dropout vllm_importance_sampling_mode "
        "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min"
    ),
    "memory and speed": (
        "gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend "
        "torch_compile_mode use_liger_kernel liger_kernel_config torch_empty_cache_steps tf32"
    ),
    "several training processes": (
        "fsdp fsdp_config deepspeed accelerator_config ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout"
    ),
    "what is logged and saved": (
        "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level "
        "log_level_replica include_num_input_tokens_seen skip_memory_metrics debug log_completions "
        "num_completions_to_print log_unique_prompts save_strategy save_steps trackio_space_id "
        "trackio_bucket_id trackio_static_space_id"
    ),
}
CARRIED = frozenset(name for names in _CARRIED.values() for name in names.split())

OWNED = {
    "output_dir": "output_dir (of the run)",
    "seed": "seed",
    "data_seed": "dataset.seed",
    "report_to": "tracker",
    "run_name": "name",
    "project": "tracker.project",
    "use_vllm": "engine",
    "vllm_mode": "engine",
    "vllm_importance_sampling_correction": "rollout.correction",
    "vllm_model_impl": "engine.args.model_impl",
    "vllm_enable_sleep_mode": "engine.colocate",
    "vllm_server_base_url": "engine.urls",
    "vllm_server_host": "engine.urls",
    "vllm_server_port": "engine.urls",
    "vllm_server_timeout": "engine.start_timeout_s",
    "vllm_group_port": "engine.weights",
    "vllm_gpu_memory_utilization": "engine.args.gpu_memory_utilization",
    "vllm_max_model_length": "model.max_model_len",
    "vllm_tensor_parallel_size": "engine.tensor_parallel_size",
    "use_transformers_continuous_batching": "engine",
    "transformers_continuous_batching_config": "engine",
    "use_transformers_paged": "engine",
    "model_init_kwargs": "model",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "bf16_full_eval": "model.dtype",
    "fp16_full_eval": "model.dtype",
    "use_cpu": "CUDA_VISIBLE_DEVICES",
    "local_rank": "placement",
    "resume_from_checkpoint": "resume",
    "save_total_limit": "checkpoint.keep_last",
    "load_best_model_at_end": "checkpoint.keep_best",
    "metric_for_best_model": "checkpoint.keep_best",
    "greater_is_better": "checkpoint.keep_best",
    "do_train": "trainer.max_steps",
    "do_eval": "evaluation",
    "do_predict": "evaluation",
    "eval_strategy": "evaluation",
    "eval_steps": "evaluation.every_steps",
    "eval_delay": "evaluation.every_steps",
    "eval_on_start": "evaluation.before",
    "per_device_eval_batch_size": "env.<name>.max_concurrency",
    "max_tool_calling_iterations": "env.<name>.max_steps",
    "mask_truncated_completions": "rollout.truncated=masked",
    "chat_template_kwargs": "model.chat_template_kwargs",
    "shuffle_dataset": "dataset.order",
    "train_sampling_strategy": "dataset.order",
    "disable_tqdm": "the live view, or python -m gymexp.status",
}


@dataclass(frozen=True)
class Refusal:
    """Why gymexp accepts only the `neutral` values (TRL's default first), and what to do instead."""

    neutral: tuple[Any, ...]
    why: str
    instead: str


def _sampling(*neutral: Any, key: str | None = None) -> Refusal:
    instead = f"evaluation.{key}=… sets it for held-out tasks" if key else "leave it out"
    return Refusal(neutral, "in training (the trainer scores the policy's whole softmax)", instead)


_GENERATES = "as engine and gateway generate, not TRL"
_HUB = "as gymexp uploads nothing"
_UPLOAD = "run `hf upload REPO RUN/model` afterwards"
_EVALUATES = "as held-out tasks are played, not scored in batches"
_LOADS = "as the trainer's dataset is a list of names, and nothing waits for it"
_LEAVE = "leave it out"

REFUSED: dict[str, Refusal] = {
    "top_p": _sampling(1.0, key="top_p"),
    "top_k": _sampling(0, -1, None, key="top_k"),
    "min_p": _sampling(None, 0, key="min_p"),
    "repetition_penalty": _sampling(1.0, None, key="repetition_penalty"),
    "generation_kwargs": _sampling(None, {}),
    "vllm_structured_outputs_regex": _sampling(None),
    "neftune_noise_alpha": Refusal(
        (None,), "as the trainer would score with noise that the engine samples without", _LEAVE
    ),
    "cast_lm_head_to_fp32": Refusal(
        (False,), "as the engine's head stays in model.dtype", "model.dtype=float32 sets both"
    ),
    "num_generations_eval": Refusal(
        (None, 1), "as each held-out task is played once", "evaluation.num_tasks sets how many are"
    ),
    "reward_weights": Refusal(
        (None, [1.0]), "as a rollout has one reward, its environment's", "env.<name>.weight sets its share"
    ),
    "vllm_importance_sampling_cap": Refusal(
        (None,), "as TRL has deprecated this name", "trainer.vllm_importance_sampling_clip_max=… is the same"
    ),
    "cache_implementation": Refusal((None,), _GENERATES, _LEAVE),
    "use_cache": Refusal((False,), _GENERATES, _LEAVE),
    "ds3_gather_for_generation": Refusal((True,), _GENERATES, _LEAVE),
    "pad_to_multiple_of": Refusal(
        ("auto", None), "as each micro-batch is cut to its longest rollout", _LEAVE
    ),
    "trust_remote_code": Refusal(
        (False,), "as models and tokenizers are loaded without code of their own", "choose another model.path"
    ),
    "label_smoothing_factor": Refusal((0.0,), "as no loss of TRL's GRPO has labels", _LEAVE),
    "average_tokens_across_devices": Refusal(
        (True,), "as trainer.loss_type decides how tokens are averaged", "choose another trainer.loss_type"
    ),
    "auto_find_batch_size": Refusal(
        (False,), "as a batch holds whole groups", "halve trainer.per_device_train_batch_size"
    ),
    "parallelism_config": Refusal(
        (None,), "as YAML cannot express it", "trainer.fsdp and trainer.deepspeed spread the policy"
    ),
    "full_determinism": Refusal(
        (False,), "as an engine samples another number of rollouts at once in each run", "set seed=… alone"
    ),
    "save_only_model": Refusal(
        (False,),
        "as a run goes on from its checkpoints, with optimizer and schedule",
        "RUN/model has the weights alone",
    ),
    "save_on_each_node": Refusal((False,), "as all nodes share one run directory", _LEAVE),
    "enable_jit_checkpoint": Refusal(
        (False,), "as gymexp itself saves on SIGTERM, after the step in progress", _LEAVE
    ),
    "ignore_data_skip": Refusal(
        (False,), "as a resumed run would play tasks again that it has played", _LEAVE
    ),
    "restore_callback_states_from_checkpoint": Refusal(
        (False,), "as no callback of gymexp keeps any", _LEAVE
    ),
    "log_completions_hub_repo": Refusal((None,), _HUB, "rollouts/ has every completion"),
    "push_to_hub": Refusal((False,), _HUB, _UPLOAD),
    "hub_token": Refusal((None,), _HUB, _UPLOAD),
    "hub_private_repo": Refusal((None,), _HUB, _UPLOAD),
    "hub_model_id": Refusal((None,), _HUB, _UPLOAD),
    "hub_strategy": Refusal(("every_save",), _HUB, _UPLOAD),
    "hub_always_push": Refusal((False,), _HUB, _UPLOAD),
    "hub_revision": Refusal((None,), _HUB, _UPLOAD),
    "prediction_loss_only": Refusal((False,), _EVALUATES, _LEAVE),
    "eval_do_concat_batches": Refusal((True,), _EVALUATES, _LEAVE),
    "eval_use_gather_object": Refusal((False,), _EVALUATES, _LEAVE),
    "eval_accumulation_steps": Refusal((None,), _EVALUATES, _LEAVE),
    "include_for_metrics": Refusal(([], None), _EVALUATES, _LEAVE),
    "batch_eval_metrics": Refusal((False,), _EVALUATES, _LEAVE),
    "label_names": Refusal((None,), _EVALUATES, _LEAVE),
    "dataloader_drop_last": Refusal(
        (False,), "as dataset.* decides which tasks an epoch plays", "choose dataset.train_size"
    ),
    "dataloader_num_workers": Refusal((0,), _LOADS, _LEAVE),
    "dataloader_persistent_workers": Refusal((False,), _LOADS, _LEAVE),
    "dataloader_prefetch_factor": Refusal((None,), _LOADS, _LEAVE),
    "dataloader_multiprocessing_context": Refusal((None,), _LOADS, _LEAVE),
    "dataloader_in_order": Refusal((True,), _LOADS, _LEAVE),
    "length_column_name": Refusal(("length",), _LOADS, _LEAVE),
}

HARMLESS = {
    "remove_unused_columns": "the trainer's dataset has the one column that TRL always keeps",
    "dataloader_pin_memory": "the trainer's dataset is text, which is never pinned",
    "log_multimodal": "no environment shows images",
}


@dataclass(frozen=True)
class _Rule:
    """The rule of a number. One that breaks it would end the run minutes later, or mean something else."""

    text: str
    holds: Callable[[Any], bool]


_AT_LEAST_1 = _Rule("must be >= 1", lambda value: value >= 1)
_AT_LEAST_0 = _Rule("must be >= 0", lambda value: value >= 0)
_ABOVE_0 = _Rule("must be > 0", lambda value: value > 0)
_SHARE = _Rule("must be between 0 and 1", lambda value: 0 <= value <= 1)
# vLLM raises a lower temperature to 0.01, and refuses one above 2.
_TEMPERATURE = _Rule("must be between 0.01 and 2 in training", lambda value: 0.01 <= value <= 2)
_NUMBERS = {
    "temperature": _TEMPERATURE,
    "max_steps": _Rule("must be >= 1, or -1 for trainer.num_train_epochs", lambda n: n >= 1 or n == -1),
} | {
    name: rule
    for rule, names in (
        (
            _AT_LEAST_1,
            "per_device_train_batch_size gradient_accumulation_steps steps_per_generation "
            "generation_batch_size num_iterations ref_model_sync_steps max_completion_length ddp_timeout",
        ),
        (
            _AT_LEAST_0,
            "learning_rate weight_decay warmup_steps max_grad_norm save_steps epsilon epsilon_high "
            "vllm_importance_sampling_clip_min num_completions_to_print",
        ),
        (
            _ABOVE_0,
            "num_train_epochs logging_steps delta sapo_temperature_neg sapo_temperature_pos "
            "off_policy_mask_threshold vllm_importance_sampling_clip_max",
        ),
        (_SHARE, "top_entropy_quantile ref_model_mixup_alpha"),
    )
    for name in names.split()
}
# These optimizers step within each backward pass, before gradients are summed over micro-batches and clipped.
_STEP_IN_BACKWARD = ("lomo", "adalomo")


def problems(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Yields a message for each value of `trainer.*` that gymexp refuses. Ignores names that TRL does not
    have; `arguments` reports these."""
    for name, value in trainer.items():
        at = f"trainer.{name}"
        if name in OWNED:
            yield f"{at} is set by gymexp: use {OWNED[name]} instead"
        elif (refusal := REFUSED.get(name)) and value not in refusal.neutral:
            yield f"{at} must be {refusal.neutral[0]!r} {refusal.why}, got {value!r}: {refusal.instead}"
        elif (rule := _NUMBERS.get(name)) and _is_number(value) and not rule.holds(value):
            yield f"{at} {rule.text}, got {value!r}"
    yield from _optimizer_problems(trainer)
    yield from _dependent_problems(trainer)
    yield from _accelerator_problems(trainer.get("accelerator_config"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _optimizer_problems(trainer: Mapping[str, Any]) -> Iterator[str]:
    optim = str(trainer.get("optim", ""))
    if optim in _STEP_IN_BACKWARD or optim.endswith("_layerwise"):
        yield (
            "trainer.optim must step once for all micro-batches, after trainer.max_grad_norm, "
            f"got {optim!r}, which steps within each backward pass: choose another, e.g. adafactor"
        )
    if optim.startswith("schedule_free"):
        yield (
            "trainer.optim must train the weights that it leaves, as the engine samples with them, "
            f"got {optim!r}, which keeps an average beside them: choose another, e.g. adamw_torch_fused"
        )
    if trainer.get("optim_target_modules") and not optim.startswith(("galore", "apollo")):
        yield (
            "trainer.optim_target_modules is for trainer.optim=galore_… and apollo_…, "
            f"got trainer.optim={optim or 'adamw_torch_fused'!r}: leave it out"
        )


def _dependent_problems(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Yields a message for each argument that does not fit another one's value."""
    if value_of(trainer, "save_strategy") not in ("steps", "epoch", "no"):
        yield (
            "trainer.save_strategy must be steps, epoch or no, "
            f"got {trainer['save_strategy']!r}: checkpoint.keep_best keeps the best"
        )
    loss, length = value_of(trainer, "loss_type"), value_of(trainer, "max_completion_length")
    if loss == "dr_grpo" and length is None:
        yield "trainer.max_completion_length must be a number with loss_type=dr_grpo, which divides by it"
    elif loss != "dr_grpo" and length not in (default("max_completion_length"), None):
        yield (
            f"trainer.max_completion_length is what loss_type=dr_grpo divides by, got {length!r} with "
            f"loss_type={loss}: env.<name>.max_output_tokens=… is what cuts a turn"
        )
    if value_of(trainer, "num_generations") is None:
        yield "trainer.num_generations must be an integer >= 2, got None"
    if trainer.get("gradient_checkpointing_kwargs") and not value_of(trainer, "gradient_checkpointing"):
        yield (
            "trainer.gradient_checkpointing_kwargs is for trainer.gradient_checkpointing=true, which is "
            f"{value_of(trainer, 'gradient_checkpointing')!r} here, got "
            f"{trainer['gradient_checkpointing_kwargs']!r}: say true, or leave it out"
        )
    if trainer.get("sync_ref_model") and not value_of(trainer, "beta"):
        yield (
            "trainer.sync_ref_model must be false with trainer.beta=0, which has no reference, "
            f"got {trainer['sync_ref_model']!r}: say trainer.beta=…"
        )
    backend, mode = trainer.get("torch_compile_backend"), trainer.get("torch_compile_mode")
    if backend not in (None, "inductor") and mode not in (None, "default"):
        yield (
            f"trainer.torch_compile_mode={mode} is for torch_compile_backend=inductor, as other backends "
            f"ignore it, got {backend!r}: leave one of them out"
        )
    for name, needed in (
        ("liger_kernel_config", "use_liger_kernel"),
        ("num_completions_to_print", "log_completions"),
        ("log_unique_prompts", "log_completions"),
    ):
        if trainer.get(name) and not trainer.get(needed):
            yield f"trainer.{name} has no effect without trainer.{needed}=true, got {trainer[name]!r}"


def _accelerator_problems(settings: Any) -> Iterator[str]:
    """Yields a message for settings of accelerate that would change the batches or their order."""
    if settings is None:
        return
    config: dict[str, Any] = dict(settings) if isinstance(settings, Mapping) else {"": settings}
    gradients = config.pop("gradient_accumulation_kwargs", None) or {}
    config.pop("non_blocking", None)
    if config or not isinstance(gradients, Mapping) or set(gradients) - {"sync_each_batch"}:
        yield (
            "trainer.accelerator_config may have non_blocking and "
            f"gradient_accumulation_kwargs.sync_each_batch alone, as TRL makes the batches, got {settings!r}"
        )


def check_model(trainer: Mapping[str, Any], directory: Path) -> None:
    """Raises ConfigError if `trainer.router_aux_loss_coef` is set for a model without experts, which has no
    such loss. directory: of the model."""
    coefficient = trainer.get("router_aux_loss_coef")
    if not coefficient:
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory).get_text_config()
    if not hasattr(config, "output_router_logits"):  # as TRL looks at it
        raise ConfigError(
            "trainer.router_aux_loss_coef must be left out with a model that is no mixture of experts "
            f"({config.model_type}), got {coefficient!r}"
        )
