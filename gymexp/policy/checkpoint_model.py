"""Turns a checkpoint of a run into a plain model directory, which transformers and vLLM load.

A checkpoint has what a resumed run needs:

* the whole model in float32, if no adapter was trained and nothing was sharded;
* the adapter alone, with LoRA;
* shards of the model or of the adapter, by FSDP2 (`pytorch_model_fsdp_0/`, a distributed checkpoint of
  torch's) or by DeepSpeed's ZeRO (`global_stepN/`).

The model directory has all weights in `model.dtype`, with an adapter merged, as the run's own `model/` has.
No GPU is needed. The peak of memory is one copy of the policy in `model.dtype`, plus one parameter in
float32; DeepSpeed also loads its optimizer's shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymexp.config.load import from_yaml
from gymexp.config.schema import ModelConfig
from gymexp.errors import ConfigError, RunDirectoryError
from gymexp.policy.model import load_model, load_tokenizer, save_policy
from gymexp.record.directory import RunDirectory, is_whole

if TYPE_CHECKING:
    import peft
    import torch

    NamedTensors = Iterator[tuple[str, torch.Tensor]]

_FSDP, _FSDP_WHOLE = "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"
_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
_WHOLE = ("model.safetensors", "model.safetensors.index.json")


def materialize(run: Path, checkpoint: Path, to: Path) -> Path:
    """Returns a directory with the policy of a checkpoint as a plain model: safetensors, configurations,
    tokenizer and chat template.

    It is the run's `model/` if the run ended at the checkpoint's step, and the checkpoint itself if that is a
    plain model in `model.dtype`. Else it is `to`, which is written whole or not at all.

    run: the run's directory. checkpoint: one of its checkpoints, which the caller has found whole, or its
    `model/`. Raises RunDirectoryError if the checkpoint has no weights or if `to` exists, and ConfigError if
    the model that training began with cannot be found.
    """
    model = from_yaml(run / "config.yaml").model
    final = run / "model"
    if checkpoint.resolve() == final.resolve() or _ended_at(run, checkpoint):
        return final
    if _is_plain(checkpoint, model.dtype):
        return checkpoint
    with written_aside(to) as part:
        _write_model(model, checkpoint, part)
    return to


def write_adapter(run: Path, checkpoint: Path, to: Path) -> None:
    """Writes the adapter of a checkpoint to the directory `to`, in peft's format, with the tokenizer.

    Raises RunDirectoryError if the run trains no adapter.
    """
    model = from_yaml(run / "config.yaml").model
    if model.lora.r is None:
        raise RunDirectoryError(f"{run} trained all weights (model.lora.r is null), so it has no adapter")
    final = run / "adapter"
    source = final if checkpoint == run / "model" or _ended_at(run, checkpoint) else checkpoint
    to.mkdir(parents=True, exist_ok=True)
    if all((source / name).is_file() for name in _ADAPTER):
        for name in _ADAPTER:
            shutil.copyfile(source / name, to / name)
    else:
        _with_adapter(model, checkpoint).save_pretrained(str(to))
        (to / "README.md").unlink(missing_ok=True)  # peft's template of a model card
    load_tokenizer(_source(model, checkpoint)).save_pretrained(to)


@contextlib.contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """Yields a new directory beside `directory`, which gets its name when the block ends. If the block fails,
    nothing of it is left. Raises RunDirectoryError if `directory` exists."""
    if directory.exists() or directory.is_symlink():
        raise RunDirectoryError(f"{directory} must not exist, as a model is about to be written to it")
    part = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # a process that was killed may have left one
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _ended_at(run: Path, checkpoint: Path) -> bool:
    """Returns whether `model/` has the checkpoint's weights: the run trained to its end at this step."""
    result = RunDirectory(run).read_result()
    is_last = is_whole(result) and checkpoint.name == f"checkpoint-{result['step']}"
    return is_last and not result.get("pruned") and _has_weights(run / "model")


def _has_weights(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _WHOLE) and (directory / "config.json").is_file()


def _is_plain(checkpoint: Path, dtype: str) -> bool:
    """Returns whether a checkpoint is a model directory with all weights in `dtype`."""
    from safetensors import safe_open

    if not _has_weights(checkpoint) or not (checkpoint / "tokenizer_config.json").is_file():
        return False
    short = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    for path in checkpoint.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            if any(file.get_slice(name).get_dtype() != short for name in file.keys()):  # noqa: SIM118
                return False
    return True


def _write_model(config: ModelConfig, checkpoint: Path, to: Path) -> None:
    """Loads the policy of a checkpoint and saves it as a run saves its final policy."""
    import torch
    from transformers.trainer_utils import align_special_tokens

    from gymexp.policy import lora  # imports torch

    dtype, source = getattr(torch, config.dtype), _source(config, checkpoint)
    if config.lora.r is not None:
        policy = _with_adapter(config, checkpoint)
        merged = lora.merged_parameters(policy, lambda _: nullcontext())
        weights = {name: value.detach().to(dtype) for name, value in merged}
        model: Any = policy.unload()
    else:
        model = load_model(source, config.dtype)
        if not _has_weights(checkpoint):
            _fill(model, _read_tensors(checkpoint), checkpoint)
        weights = {name: value.detach().to(dtype) for name, value in model.named_parameters()}
    tokenizer = load_tokenizer(source)
    align_special_tokens(model, tokenizer)  # as transformers does before it trains
    save_policy(model, weights, tokenizer, to)


def _source(config: ModelConfig, checkpoint: Path) -> ModelConfig:
    """Returns the configuration of the model and tokenizer to load: those of the checkpoint, or those that
    training began with if the checkpoint has an adapter or shards. Attention is eager, which every model
    has, as this machine may lack the run's."""
    config = dataclasses.replace(config, attn_implementation="eager")
    if not _has_weights(checkpoint):
        return config
    return dataclasses.replace(config, path=str(checkpoint.resolve()), revision=None)


def _with_adapter(config: ModelConfig, checkpoint: Path) -> peft.PeftModel:
    """Returns the model that training began with, with the checkpoint's adapter in it."""
    import torch
    from peft import get_peft_model, set_peft_model_state_dict

    from gymexp.policy.lora import build_peft_config

    base = load_model(_source(config, checkpoint), config.dtype)
    policy: Any = get_peft_model(base, build_peft_config(config.lora, base))
    tensors = {name.replace(".default.", "."): tensor for name, tensor in _read_tensors(checkpoint)}
    if _is_zero(checkpoint):
        # DeepSpeed's optimizer has the adapter in float32, but what trains and samples is in model.dtype.
        policy.to(getattr(torch, config.dtype))
    loaded = set_peft_model_state_dict(policy, tensors)
    missing = [name for name in loaded.missing_keys if policy.prefix in name]
    if missing or loaded.unexpected_keys:
        raise _other_model(checkpoint, [*missing, *loaded.unexpected_keys][0])
    return policy


def _fill(model: Any, tensors: NamedTensors, checkpoint: Path) -> None:
    """Copies the tensors into the model's parameters and buffers, one after the other. Raises
    RunDirectoryError unless their names are the model's."""
    ours = model.state_dict()
    seen = set()
    for name, tensor in tensors:
        if name not in ours or ours[name].shape != tensor.shape:
            raise _other_model(checkpoint, name)
        ours[name].copy_(tensor)
        seen.add(name)
    if missing := ours.keys() - seen:
        raise _other_model(checkpoint, min(missing))


def _other_model(checkpoint: Path, name: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"{checkpoint} must have the weights of the model that its run's config.yaml names, but they differ "
        f"in {name}: put back the config.yaml and the model (model.path) that the run began with"
    )


def _is_zero(checkpoint: Path) -> bool:
    return any(checkpoint.glob("global_step*"))


def _read_tensors(checkpoint: Path) -> NamedTensors:
    """Yields the names and tensors of an adapter or of shards, one whole tensor after the other. Raises
    RunDirectoryError if the checkpoint has neither."""
    import torch

    if (checkpoint / _ADAPTER[0]).is_file():
        from safetensors import safe_open

        with safe_open(checkpoint / _ADAPTER[0], "pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    elif (checkpoint / _FSDP).is_dir():
        yield from _read_distributed(checkpoint / _FSDP)
    elif (checkpoint / _FSDP_WHOLE).is_file():
        yield from torch.load(checkpoint / _FSDP_WHOLE, mmap=True, weights_only=True).items()
    elif _is_zero(checkpoint):
        yield from _read_zero(checkpoint)
    else:
        raise RunDirectoryError(
            f"{checkpoint} must have weights (model.safetensors, adapter_model.safetensors, {_FSDP}/ or "
            "global_step…/), but it has none: choose another checkpoint"
        )


def _read_distributed(directory: Path) -> NamedTensors:
    """Yields the tensors of a distributed checkpoint of torch's. accelerate puts them below "model"."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = FileSystemReader(directory).read_metadata().state_dict_metadata
    for key, entry in metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a single process
                load(state, checkpoint_id=directory, no_dist=True)
            yield key.removeprefix("model."), state[key]


def _read_zero(checkpoint: Path) -> NamedTensors:
    """Yields the tensors of a ZeRO checkpoint, in float32. Raises ConfigError without DeepSpeed."""
    try:
        from deepspeed.utils.zero_to_fp32 import (  # pyright: ignore[reportMissingImports]
            get_fp32_state_dict_from_zero_checkpoint,
        )
    except ImportError:
        raise ConfigError(
            f"{checkpoint} has shards of DeepSpeed's, which deepspeed itself must read, but it is not "
            'installed here: pip install "gymexp[deepspeed]"'
        ) from None
    with contextlib.redirect_stdout(None):  # it reports every file
        tensors = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), lazy_mode=True)
    for name, tensor in tensors.items():
        yield name, tensor.contiguous()
