"""Loads and saves a policy: its tokenizer and its weights, from a directory or from the Hugging Face hub."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymexp.config.schema import ModelConfig
from gymexp.errors import ConfigError
from gymexp.policy.hub_snapshot import directory_of
from gymexp.rollout.tokens import end_of_turn_ids

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Returns the policy's tokenizer, with a pad token.

    Raises ConfigError if there is no tokenizer, or if it has no chat template or no end token.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, config, "tokenizer")
    check_tokenizer(tokenizer, config.path)
    if tokenizer.pad_token_id is None:
        # A pad token is never sampled and never in the loss, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(tokenizer: Any, path: str | Path) -> None:
    """Raises ConfigError unless the tokenizer has an end token and a chat template.

    path: the model's name in the message.
    """
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


def load_model(config: ModelConfig, dtype: str | None = None) -> PreTrainedModel:
    """Returns the policy to train, on the CPU. dtype: of all weights, if they will not be trained.

    Weights that the optimizer updates are float32, although the arithmetic is in `model.dtype`: a step of
    1e-6 is lost on a bfloat16 weight of 0.02, whose neighbours are 6e-5 or more away. With an adapter the
    weights stay fixed and are in `model.dtype`. Raises ConfigError if the model cannot be loaded, or if
    transformers could not save it later.
    """
    from transformers import AutoModelForCausalLM

    model = _from_pretrained(
        AutoModelForCausalLM,
        config,
        "model",
        dtype=dtype or (config.dtype if config.lora.r else "float32"),
        attn_implementation=config.attn_implementation,
    )
    _make_savable(model.generation_config, config.path)
    return model


def _make_savable(generation: Any, path: str) -> None:
    """Corrects a generation config that transformers loads but refuses to save.

    Most such configs have a temperature or a top_p beside do_sample=false. The function sets do_sample=true,
    which changes no rollout: the engine takes its sampling parameters from the run. Raises ConfigError if
    transformers still refuses.
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
        log.info("generation_config.json: set do_sample=true, without which transformers refuses to save it")


def save_policy(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> None:
    """Saves a policy to a directory that transformers and vLLM can load.

    weights: the parameters, on the CPU and all of one dtype. The buffers and the configuration come from
    `model`. The tokenizer is saved with its chat template.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value.cpu() for name, value in model.state_dict().items() if name not in parameters}
    model.save_pretrained(directory, state_dict=buffers | weights)
    tokenizer.save_pretrained(directory)
    # save_pretrained writes the dtype and use_cache=false of the model in training.
    path = directory / "config.json"
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = json.loads(path.read_text()) | {"dtype": dtype, "use_cache": True}
    path.write_text(json.dumps(config, indent=2) + "\n")


def end_token_ids(tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> list[int]:
    """Returns the ids that end a generation, for the engine and for the loss: the tokenizer's end token, the
    end tokens in the model's generation_config.json, and the special token that ends a turn of the template.

    directory: the model's directory. Needs no torch, as the gateway, which imports none, needs the same ids.
    """
    file = Path(directory) / "generation_config.json"  # optional in a model
    ids = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return sorted({*end_of_turn_ids(tokenizer), *ids})


def _from_pretrained(auto: Any, config: ModelConfig, part: str, **options: Any) -> Any:
    directory = directory_of(config)
    try:
        # False, as transformers would ask in the terminal whether to run the code of a model.
        return auto.from_pretrained(directory, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"model.path={config.path!r}: its {part} cannot be loaded from {directory} ({reason.strip()}). "
            "Say model.path=… with another directory or hub id"
        ) from error
