"""The policy's weights as others get them: the engine, and the files of the final model. They are whole, on
the accelerator, one tensor after the other, under the names of files.

Every rank must iterate over all of them, because gathering a sharded parameter is a collective operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gymexp.config import lora_rules
from gymexp.config.schema import ModelConfig
from gymexp.engine.replicas import NamedTensors
from gymexp.policy import lora

if TYPE_CHECKING:
    from gymexp.training.trainer import PolicyTrainer


def sent(trainer: PolicyTrainer, config: ModelConfig) -> NamedTensors:
    """Yields what the engine's servers get in an update, in `model.dtype`: all of the policy's parameters or,
    with `model.lora.sync=adapter`, those of the adapter under the names of peft's files."""
    if not lora_rules.is_sent(config.lora):
        yield from trainer.named_weights()
        return
    for name, tensor in adapter(trainer):
        yield lora.saved_name(name), tensor.to(getattr(torch, config.dtype))


def whole(trainer: PolicyTrainer, config: ModelConfig) -> NamedTensors:
    """Yields the policy's parameters in `model.dtype`, under the names of its checkpoint. With LoRA, the
    adapter is merged into them."""
    model: Any = trainer.model
    gathered = trainer._dist.gather_params
    with_lora = config.lora.r is not None
    parameters = lora.merged_parameters(model, gathered) if with_lora else _parameters(model, gathered)
    for name, tensor in _gathered(trainer, parameters):
        yield name, tensor.to(getattr(torch, config.dtype))


def adapter(trainer: PolicyTrainer) -> NamedTensors:
    """Yields the adapter's parameters as they are, under their names in the model."""
    model: Any = trainer.model
    yield from _gathered(trainer, lora.adapter_parameters(model, trainer._dist.gather_params))


def _parameters(model: Any, gathered: Any) -> NamedTensors:
    """Yields the model's parameters as they are; ZeRO-3's shards are gathered one after the other."""
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            yield name, parameter.data


def _gathered(trainer: PolicyTrainer, tensors: NamedTensors) -> NamedTensors:
    """Yields the tensors on the accelerator, under the checkpoint's names. Gathers FSDP2's shards one tensor
    after the other."""
    device = trainer.accelerator.device
    for module in trainer.model.modules():  # pyright: ignore[reportOptionalMemberAccess]
        if isinstance(module, FSDPModule):
            module.reshard()  # A pass without gradients leaves some modules gathered.
    for name, tensor in tensors:
        # The tensor may be offloaded, or not yet prepared for training.
        if tensor.device.type != device.type:
            tensor = tensor.to(device)
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        yield name.replace("_checkpoint_wrapped_module.", ""), tensor
