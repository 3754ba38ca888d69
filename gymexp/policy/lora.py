"""LoRA by peft: training changes an adapter and leaves the policy's own weights as they are.

peft puts the adapter's layers into the model in place, so that every user of the model object, such as the hf
engine, samples with the adapter from then on.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gymexp.config.schema import LoraConfig, ModelConfig
from gymexp.config.suggestions import nearest
from gymexp.errors import ConfigError

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel

_ADAPTER = "default"  # peft's name of an adapter that was given none


def build_peft_config(config: LoraConfig, model: PreTrainedModel) -> peft.LoraConfig:
    """Returns peft's configuration for a `config` whose rank `r` is set.

    Raises ConfigError for a name in `target_modules` that the model does not have: peft refuses such a name
    only if the model has none of the names.
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
    """Writes the base model of a saved adapter into adapter_config.json: its hub id and commit, which are
    valid on every machine, in place of the directory in this machine's cache.

    The function edits the file because peft, given a hub id, would send a request to the hub when it saves.
    """
    if model.revision is not None:
        path = directory / "adapter_config.json"
        base = {"base_model_name_or_path": model.path, "revision": model.revision}
        path.write_text(json.dumps(json.loads(path.read_text()) | base, indent=2) + "\n")


def _check_targets(targets: str | list[str], model: PreTrainedModel) -> None:
    linear = _linear_modules(model)
    if isinstance(targets, str):
        matched = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
        missing = [name for name in matched if name not in linear] if matched else [targets]
    else:
        missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
    if missing:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ConfigError(
            "model.lora.target_modules must name linear layers of the model other than its output head, and "
            f"{missing[0]!r} is none"
            f"{nearest(missing[0], known)}. Known: {', '.join(known)}"
        )


def _linear_modules(model: PreTrainedModel) -> list[str]:
    """Returns the names of the layers that may get an adapter: all linear layers except the output head, from
    whose weight alone TRL computes log-probabilities."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]


def adapter_parameters(
    model: peft.PeftModel, gathered: Callable[[list[torch.nn.Parameter]], AbstractContextManager[Any]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields name and tensor of each parameter of the adapter. gathered: as in `merged_parameters`; the
    model's own parameters are not gathered."""
    for name, parameter in model.named_parameters():
        if model.prefix in name:
            with gathered([parameter]):
                yield name, parameter.data


def saved_name(name: str) -> str:
    """Returns the name that a parameter of the adapter has in peft's files."""
    return name.replace(f".{_ADAPTER}.", ".")


def save_adapter(directory: Path, weights: Iterator[tuple[str, torch.Tensor]], config: LoraConfig) -> None:
    """Writes an adapter in peft's format, as adapter_model.safetensors and adapter_config.json, into a new
    `directory`, or in place of an old one. weights: with the names of peft's files."""
    import peft
    from safetensors.torch import save_file

    assert config.r is not None
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    layers = {re.split(r"\.lora_[AB]\.", name)[0] for name in tensors}
    peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=sorted({layer.rsplit(".", 1)[-1] for layer in layers}),
        task_type=peft.TaskType.CAUSAL_LM,
        inference_mode=True,
    ).save_pretrained(str(directory))


def merged_parameters(
    model: peft.PeftModel, gathered: Callable[[list[torch.nn.Parameter]], AbstractContextManager[Any]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields name and tensor of each parameter as a checkpoint of the merged model has them.

    gathered: returns a context in which sharded parameters are whole.

    The model itself does not change. peft and TRL merge the adapter into the model and take it out again,
    which would round frozen bfloat16 weights a little at every step; a resumed run, which loads these weights
    anew, would lose the rounding.
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
