"""Loading a policy: its tokenizer and its weights, from a directory or from the Hugging Face hub."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymexp.config.schema import ModelConfig
from gymexp.errors import ConfigError
from gymexp.policy.snapshot import directory_of
from gymexp.rollout.tokens import end_of_turn_ids

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, with a chat template and a pad token. Raises ConfigError if it has none or is
    not there."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, config, "tokenizer")
    check_tokenizer(tokenizer, config.path)
    if tokenizer.pad_token_id is None:
        # Never sampled and never in the loss: any token serves.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(tokenizer: Any, path: str | Path) -> None:
    """Raises ConfigError unless it has an end token and a chat template. path: what to call its model."""
    templates = tokenizer.chat_template
    if not templates:
        raise ConfigError(
            f"model.path must name a model whose tokenizer has a chat template, got {str(path)!r}, which "
            "has none: use the model's instruct version"
        )
    if isinstance(templates, dict) and "default" not in templates:
        raise ConfigError(
            f"model.path: of several chat templates one must be named default, {str(path)!r} has "
            f"{', '.join(sorted(templates))}: rename one in a copy of the model"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path must name a model whose tokenizer has an end token, got {str(path)!r}")


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The policy to train, on the CPU. Weights that an optimizer steps are float32, whatever `model.dtype`
    says of the arithmetic; those that an adapter leaves as they are, in `model.dtype`.

    A step of 1e-6 is lost on a bfloat16 weight of 0.02, whose neighbours are 6e-5 or more away. Raises
    ConfigError if it is not there, or could not be saved later.
    """
    from transformers import AutoModelForCausalLM

    model = _from_pretrained(
        AutoModelForCausalLM,
        config,
        "model",
        dtype=config.dtype if config.lora.r else "float32",
        attn_implementation=config.attn_implementation,
    )
    _make_savable(model.generation_config, config.path)
    return model


def _make_savable(generation: Any, path: str) -> None:
    """transformers loads some generation_config.json that it will not save: most have a temperature or a
    top_p beside do_sample=false. The engine samples as the run says, so that do_sample is free to be true.
    """
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
        try:
            generation.validate(strict=True)
        except ValueError as error:
            raise ConfigError(
                f"model.path={path!r}: its generation_config.json must be one that transformers saves, as "
                f"the trained policy keeps it: correct it in a copy of the model. transformers says: {error}"
            ) from None
        log.info("generation_config.json: do_sample is true now, without which transformers saves no model")


def save_policy(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> None:
    """A directory that transformers and vLLM load: `weights` (on the CPU, all of one dtype) and whatever else
    `model` keeps, under its configuration, with the tokenizer and its chat template."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value.cpu() for name, value in model.state_dict().items() if name not in parameters}
    model.save_pretrained(directory, state_dict=buffers | weights)
    tokenizer.save_pretrained(directory)
    # save_pretrained describes the model in training: its dtype, and no cache.
    path = directory / "config.json"
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    described = json.loads(path.read_text()) | {"dtype": dtype, "use_cache": True}
    path.write_text(json.dumps(described, indent=2) + "\n")


def end_token_ids(tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> list[int]:
    """The ids that end a generation, in the engine as for the loss: the tokenizer's end token, those of the
    model's generation_config.json, and the special token that ends a turn of the chat template.

    directory: the model's. Needs no torch: the gateway, which has none, stops at the same ids.
    """
    file = Path(directory) / "generation_config.json"  # a model may come without
    more = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    more = more if isinstance(more, list) else [] if more is None else [more]
    return sorted({*end_of_turn_ids(tokenizer), *more})


def _from_pretrained(auto: Any, config: ModelConfig, what: str, **options: Any) -> Any:
    directory = directory_of(config)
    try:
        return auto.from_pretrained(directory, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"model.path={config.path!r}: its {what} cannot be loaded from {directory} ({reason.strip()}). "
            "Say model.path=… with another directory or hub id"
        ) from error
