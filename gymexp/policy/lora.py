"""LoRA: the policy's own weights stay as they are, and an adapter beside them is trained (peft).

peft puts the adapter's layers into the model that it is given, in place: whoever holds the model, as the hf
engine does, samples with the adapter from then on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gymexp.config.names import nearest
from gymexp.config.schema import LoraConfig, ModelConfig
from gymexp.errors import ConfigError

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel


def build_peft_config(config: LoraConfig, model: PreTrainedModel) -> peft.LoraConfig:
    """peft's own configuration, of a `config` with a rank.

    Raises ConfigError for a name in `target_modules` that the model does not have: peft says so only where it
    has none of them.
    """
    import peft

    assert config.r is not None
    if config.target_modules != "all-linear":
        _check_targets(config.target_modules, model)
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        task_type=peft.TaskType.CAUSAL_LM,
    )


def name_base(directory: Path, model: ModelConfig) -> None:
    """Say in a saved adapter which model it belongs to: a hub id and a commit, which others have as well, in
    place of where this machine's cache has them.

    On the file: peft would ask the hub about a model of that name when it saves.
    """
    if model.revision is not None:
        path = directory / "adapter_config.json"
        base = {"base_model_name_or_path": model.path, "revision": model.revision}
        path.write_text(json.dumps(json.loads(path.read_text()) | base, indent=2) + "\n")


def _check_targets(targets: str | list[str], model: PreTrainedModel) -> None:
    linear = _linear_modules(model)
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, name) for name in linear) else [targets]
    else:
        missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
    if missing:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ConfigError(
            f"model.lora.target_modules must name linear layers of the model, and {missing[0]!r} is none"
            f"{nearest(missing[0], known)}. Known: {', '.join(known)}"
        )


def _linear_modules(model: PreTrainedModel) -> list[str]:
    """Names of the layers that an adapter may go to. Not the output head: TRL computes log-probabilities from
    its weight alone."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]


def merged_parameters(
    model: peft.PeftModel, gathered: Callable[[list[torch.nn.Parameter]], AbstractContextManager[Any]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters as a checkpoint of the merged model has them: name and tensor.

    gathered: a block in which parameters that are sharded are whole.

    The model itself is not touched. Merging into it and taking the adapter out again, as peft and TRL do,
    would round frozen bfloat16 weights a little at every step, and what was kept of them would change back.
    """
    base: Any = model.get_base_model()
    for name, parameter in base.named_parameters():
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            module = base.get_submodule(layer)
            with gathered(list(module.parameters())):
                yield f"{layer}.weight", _merged_weight(module, parameter)
        elif model.prefix not in name:  # the adapter's own
            with gathered([parameter]):
                yield name.replace(".base_layer.", "."), parameter.data


@torch.no_grad()
def _merged_weight(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
    return (weight + delta).to(weight.dtype)
