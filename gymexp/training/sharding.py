"""The settings of `trainer.fsdp` and `trainer.deepspeed`, which shard the policy, its gradients and its
optimizer over the GPUs.

This module fills in what users leave out: the keys of DeepSpeed's configuration that follow from `trainer.*`
("auto"), and the precision of FSDP's sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gymexp.cluster.placement import Placement
from gymexp.config.schema import RunConfig
from gymexp.errors import ConfigError

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

# Keys of DeepSpeed's configuration that transformers fills in from its own arguments and the model.
_AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}
_AUTO_ZERO = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def check(config: RunConfig, placement: Placement) -> None:
    """Raises ConfigError if `seed`, `trainer.ddp_backend`, `trainer.fsdp` or `trainer.deepspeed` does not
    suit the placement's number of training processes."""
    trainer, count = config.trainer, placement.num_ranks
    if config.seed > 2**32 - count:
        raise ConfigError(
            f"seed must be at most 2**32 - {count} with {count} training processes, each of which adds its "
            f"number to it, got {config.seed}"
        )
    if count < 2 and trainer.get("ddp_backend") is not None:
        raise ConfigError(
            "trainer.ddp_backend must be left out where a single process trains, got "
            f"{trainer['ddp_backend']!r}"
        )
    key = next((key for key in ("fsdp", "deepspeed") if trainer.get(key)), None)
    if key is None:
        return
    if placement.in_trainer:
        raise ConfigError(
            f"trainer.{key} shards the policy, and engine=hf samples from it in the trainer's one process, "
            f"got {trainer[key]!r}: say engine=vllm, or placement.rollout_nodes=1"
        )
    if count < 2:
        raise ConfigError(
            f"trainer.{key} must be left out where fewer than two GPUs or nodes train ({count} here), got "
            f"{trainer[key]!r}: say placement.train_gpus=… or engine.colocate=true with more GPUs"
        )


def complete(trainer: dict[str, Any]) -> dict[str, Any]:
    """Returns `trainer.*` with the missing keys of `deepspeed` and `fsdp_config` filled in. A configuration
    that is in a file stays as the user wrote it.

    FSDP's checkpoints are shards, as DeepSpeed's are, because gathering the optimizer's state would take time
    and the first rank's memory.
    """
    completed = dict(trainer)
    if isinstance(config := trainer.get("deepspeed"), dict):
        zero = dict.fromkeys(_AUTO_ZERO, "auto") | config["zero_optimization"]
        completed["deepspeed"] = _AUTO | config | {"zero_optimization": zero}
    if trainer.get("fsdp") and isinstance(config := trainer.get("fsdp_config") or {}, dict):
        completed["fsdp_config"] = {"state_dict_type": "SHARDED_STATE_DICT"} | config
    return completed


def keep_precision(args: GRPOConfig) -> None:
    """Lets FSDP2 compute in 16 bits as autocast does without FSDP: gradients are summed in float32, and the
    log-probabilities that the model returns stay float32. accelerate's own policy rounds both."""
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(args.mixed_precision)
    if args.fsdp_plugin_args is None or dtype is None:
        return
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin: dict[str, Any] = args.fsdp_plugin_args
    plugin["mixed_precision_policy"] = MixedPrecisionPolicy(getattr(torch, dtype), reduce_dtype=torch.float32)


def gather_head(model: Any, *_: Any) -> None:
    """Gathers the output head's weight before a forward pass.

    FSDP2 gathers a module's weight when the module is called, but TRL reads the head's weight without calling
    the head. If the head is sharded as a module of its own (beside an adapter), the backward pass fails
    without this hook.
    """
    from torch.distributed.fsdp import FSDPModule

    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()
