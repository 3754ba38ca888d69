"""Suggestions for an unknown key: the nearest known key, or the key that other programs call by that name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_ALIASES_OF = {
    "trainer.learning_rate": "lr",
    "trainer.per_device_train_batch_size": (
        "bs batch_size train_batch_size per_device_batch_size micro_batch_size mini_batch_size"
    ),
    "trainer.gradient_accumulation_steps": (
        "grad_accum grad_acc gradient_accumulation accumulate_grad_batches accumulation_steps"
    ),
    "trainer.num_train_epochs": "epochs num_epochs max_epochs total_epochs",
    "trainer.max_steps": "steps num_steps total_steps max_train_steps num_training_steps",
    "trainer.num_generations": "group_size num_rollouts rollouts_per_prompt num_samples samples_per_prompt",
    "trainer.beta": "kl kl_coef kl_beta kl_coeff kl_weight",
    "trainer.epsilon": "clip clip_eps clip_range cliprange clip_ratio",
    "trainer.temperature": "temp",
    "trainer.warmup_steps": "warmup num_warmup_steps",
    "trainer.lr_scheduler_type": "scheduler lr_scheduler lr_schedule",
    "trainer.optim": "optimizer",
    "trainer.weight_decay": "wd",
    "trainer.max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clipping gradient_clip_val",
    "trainer.save_steps": "save_every save_freq save_interval checkpoint_every",
    "evaluation.every_steps": "eval_every eval_freq eval_interval eval_steps test_freq",
    "model.max_model_len": "max_length max_len max_seq_len max_seq_length context_length seq_len",
    "env.<name>.max_output_tokens": "max_tokens max_new_tokens max_response_length response_length",
    "env.<name>.max_steps": "max_turns num_turns",
    "model.path": "model_name model_name_or_path pretrained model_path checkpoint_path",
    "model.dtype": "precision torch_dtype bf16 fp16",
    "model.lora.r": "lora_r lora_rank rank",
    "launcher.gpus": "gpus num_gpus n_gpus gpus_per_node",
    "launcher.time": "time_limit timeout walltime",
    "tracker.project": "project wandb_project project_name",
    "name": "run_name exp_name experiment_name",
    "output_dir": "out out_dir outdir outputs save_dir log_dir",
}
ALIASES = {alias: key for key, aliases in _ALIASES_OF.items() for alias in aliases.split()}


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Returns `; did you mean …?` with the known name nearest to `name`, or "" if none is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def suggestion(name: str, known: Sequence[str], prefix: str = "", everywhere: Iterable[str] = ()) -> str:
    """Returns `; did you mean …?` with the key that an unknown part of a key may stand for, or "".

    name: the unknown part. known: the names that are valid below `prefix`. everywhere: whole keys; if no name
    of `known` is near, a key with the same or a similar last part is suggested.
    """
    if difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return nearest(name, known, prefix)
    ends = {key.rpartition(".")[2]: key for key in everywhere}
    if key := ALIASES.get(name) or ends.get(name):
        return f"; did you mean {key.replace('env.<name>.', prefix) if prefix.startswith('env.') else key}?"
    if text := nearest(name, known, prefix):
        return text
    close = difflib.get_close_matches(name, list(ends), n=1, cutoff=0.75)
    return f"; did you mean {ends[close[0]]}?" if close else ""
