"""Whether a model can be trained in packs (`model.packing`), by its config.json. Needs no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gymexp.cluster.placement import compute_capabilities, visible_gpus
from gymexp.config.packing import problems_of_packs
from gymexp.config.schema import ModelConfig, RunConfig
from gymexp.errors import ConfigError

# Model types whose tokens meet in nothing but full causal attention, and whose attention takes what packs
# need. tests/training/test_packing.py compares each of them with its own padded pass.
MODEL_TYPES = ("llama", "mistral", "olmo2", "qwen2", "qwen3")
_OLDEST_TORCH = (2, 11)  # its attention for sequences of different lengths has a causal mask from the end
_OLDEST_GPU = (8, 0)  # the compute capability that FlashAttention needs
_COMPARED_UNTIL = (9, 99)  # tests/training/test_packing_gpu.py has passed on an H200


def chosen(config: RunConfig, directory: Path, trains_on_gpu: bool) -> tuple[str, str]:
    """Returns what `model.packing=auto` means for the model in `directory`, and why rows are padded although
    GPUs train; "" if they are not."""
    if not trains_on_gpu:
        return "none", ""
    of_model = json.loads((directory / "config.json").read_text())
    with_packs = dataclasses.replace(config, model=dataclasses.replace(config.model, packing="tree"))
    reasons = [*problems_of_packs(with_packs), *problems_of_model(of_model), *_problems_here()]
    if config.model.dtype == "float32":
        reasons.append("as FlashAttention has no float32 (model.dtype)")
    if any(gpu > _COMPARED_UNTIL for gpu in compute_capabilities()):
        reasons.append(
            "as it was not compared with padded rows on GPUs as new as these; tree can be asked for"
        )
    return ("none", reasons[0]) if reasons else ("tree", "")


def check(model: ModelConfig, directory: Path) -> None:
    """Raises ConfigError if `model.packing` cannot work with the model in `directory`, or with this machine's
    torch or GPUs."""
    if model.packing == "none":
        return
    config = json.loads((directory / "config.json").read_text())
    if rules := [*problems_of_model(config), *_problems_here()]:
        raise ConfigError(
            f"model.packing must be none with model.path={model.path!r}, {rules[0]}, got {model.packing!r}"
        )


def problems_of_model(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields why a model with this config.json cannot be packed."""
    if (kind := config.get("model_type")) not in MODEL_TYPES:
        types = ", ".join(MODEL_TYPES)
        yield f"as only models of type {types} were compared with their padded pass, not {kind}"
    layers = {layer for layer in config.get("layer_types") or () if layer != "full_attention"}
    # Qwen's have a window in their config.json that use_sliding_window=false switches off.
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if layers or window is not None:
        what = ", ".join(sorted(layers)) or f"a sliding window of {window} tokens"
        yield f"whose layers have {what} instead of full attention alone"
    if config.get("attention_dropout"):
        yield f"whose attention_dropout of {config['attention_dropout']} the packed attention does not have"


def _problems_here() -> Iterator[str]:
    """Yields why this machine's torch or GPUs cannot train in packs. Without a GPU any can."""
    if not visible_gpus():
        return
    with contextlib.suppress(PackageNotFoundError):
        installed = version("torch")
        if tuple(int(part) for part in installed.split("+")[0].split(".")[:2]) < _OLDEST_TORCH:
            needed = ".".join(map(str, _OLDEST_TORCH))
            yield f"as it needs torch {needed} on a GPU, and {installed} is installed"
    oldest = min(compute_capabilities(), default=_OLDEST_GPU)
    if oldest < _OLDEST_GPU:
        has = ".".join(map(str, oldest))
        yield f"as FlashAttention needs GPUs of compute capability 8.0, and one here has {has}"
