"""How vLLM serves the policy's adapter (`model.lora.sync=adapter`): under which name, up to which rank, of
which models. Needs no torch.

Each version of the adapter has a name of its own, which the gateway sends with every request. So vLLM answers
404 to a request for weights that it does not have; it never samples from the model alone in their place.
"""

from __future__ import annotations

import json
from pathlib import Path

from gymexp.config.lora_rules import MAX_RANK, is_sent
from gymexp.config.schema import ModelConfig
from gymexp.config.suggestions import nearest
from gymexp.errors import ConfigError

# Model types whose linear layers have the same names in transformers' model as in vLLM's, which takes
# adapters of them (0.31, `SupportsLoRA`).
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Those layers, but for the output head.
_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What vLLM takes for --max-lora-rank, but for 1.
_RANKS = (8, 16, 32, 64, 128, 256, 320, MAX_RANK)


def name_of(version: int) -> str:
    """Returns the engine's name of the adapter. version: of its weights, in optimizer steps done."""
    return f"policy-{version}"


def max_rank(r: int) -> int:
    """Returns vLLM's --max-lora-rank for an adapter of rank r, at most MAX_RANK."""
    return next(rank for rank in _RANKS if rank >= r)


def check(model: ModelConfig, directory: Path, engine: str, on_gpu: bool) -> None:
    """Raises ConfigError if vLLM may not serve an adapter of the model in `directory`. engine: hf or vllm."""
    if not is_sent(model.lora) or engine != "vllm":
        return
    if on_gpu and model.dtype == "float32":
        raise ConfigError(
            "model.dtype must be bfloat16 or float16 with model.lora.sync=adapter, as vLLM's kernels for "
            "adapters on a GPU have no float32, got 'float32'; or say model.lora.sync=merged"
        )
    kind = json.loads((directory / "config.json").read_text()).get("model_type")
    if kind not in MODEL_TYPES:
        raise ConfigError(
            f"model.lora.sync must be merged with model.path={model.path!r}, whose type is {kind}: vLLM gets "
            f"adapters of the types {', '.join(MODEL_TYPES)} alone, got 'adapter'"
        )
    targets = model.lora.target_modules
    for target in targets if isinstance(targets, list) else ():
        if (layer := target.rsplit(".", 1)[-1]) not in _LAYERS:
            raise ConfigError(
                f"model.lora.target_modules must name layers of {', '.join(_LAYERS)} with "
                f"model.lora.sync=adapter, got {target!r}{nearest(layer, _LAYERS)}"
            )
