"""Whether a model can be trained in packs (`model.packing`), by its config.json. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gymexp.cluster.placement import visible_gpus
from gymexp.config.schema import ModelConfig
from gymexp.errors import ConfigError

# Model types whose tokens meet in nothing but full causal attention, and whose attention takes what packs
# need. tests/training/test_packing.py compares each of them with its own padded pass.
MODEL_TYPES = ("llama", "mistral", "olmo2", "qwen2", "qwen3")
_OLDEST_TORCH = (2, 11)  # its attention for sequences of different lengths has a causal mask from the end


def check(model: ModelConfig, directory: Path) -> None:
    """Raises ConfigError if `model.packing` cannot work with the model in `directory`, or with this machine's
    torch on a GPU."""
    if model.packing == "none":
        return
    config = json.loads((directory / "config.json").read_text())
    rules = [*problems_of_model(config), *(_torch_problems() if visible_gpus() else ())]
    if rules:
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


def _torch_problems() -> Iterator[str]:
    try:
        installed = version("torch")
    except PackageNotFoundError:
        return
    if tuple(int(part) for part in installed.split("+")[0].split(".")[:2]) < _OLDEST_TORCH:
        yield f"as it needs torch {'.'.join(map(str, _OLDEST_TORCH))} on a GPU, and {installed} is installed"
