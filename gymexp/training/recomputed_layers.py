"""Keys of `trainer.gradient_checkpointing_kwargs` that are not torch's. `every_n_layers` says which layers
the backward pass computes again, `offload` whether the node's memory keeps their inputs meanwhile; both are
transformers' own. `every_n_layers=auto` is gymexp's: it goes by the free memory (`kept_layers`), and is the
default on a GPU.

transformers' Trainer takes them out of the arguments before torch gets these. TRL switches checkpointing off
and on again around its passes without a gradient, and does not (1.16).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    from gymexp.training.kept_layers import KeptLayers

LAYER_OPTIONS = {"every_n_layers": "auto", "offload": False}  # with the values that they have if left out
_KEY = "trainer.gradient_checkpointing_kwargs"


def split(kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options of the layers, and the arguments of `torch.utils.checkpoint`. kwargs: a mapping of
    both, or None."""
    given = dict(kwargs or {})
    return {name: given.pop(name, default) for name, default in LAYER_OPTIONS.items()}, given


def check(args: GRPOConfig, has_gpu: bool) -> None:
    """Raises ValueError if an option of the layers has no valid value. has_gpu: whether a GPU trains."""
    kwargs: Any = args.gradient_checkpointing_kwargs
    options, _ = split(kwargs)
    every, offload = options["every_n_layers"], options["offload"]
    if every != "auto" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise ValueError(f"{_KEY}.every_n_layers must be auto or an integer >= 1, got {every!r}")
    if not isinstance(offload, bool):
        raise ValueError(f"{_KEY}.offload must be true or false, got {offload!r}")
    if offload and not has_gpu:
        raise ValueError(f"{_KEY}.offload must be false where no GPU trains, got true")
    if "every_n_layers" in (kwargs or {}) and every == "auto" and (reason := _not_by_memory(args, has_gpu)):
        raise ValueError(f"{_KEY}.every_n_layers must be an integer >= 1 {reason}, got 'auto'")


def is_by_memory(args: GRPOConfig, has_gpu: bool) -> bool:
    """Returns whether the free memory decides which layers are computed again."""
    options, _ = split(args.gradient_checkpointing_kwargs)
    is_auto = bool(args.gradient_checkpointing) and options["every_n_layers"] == "auto"
    return is_auto and not _not_by_memory(args, has_gpu)


def _not_by_memory(args: GRPOConfig, has_gpu: bool) -> str:
    if not has_gpu:
        return "where no GPU trains"
    if args.deepspeed:
        return "with trainer.deepspeed, with which auto was not tried"
    if split(args.gradient_checkpointing_kwargs)[0]["offload"]:
        return "with offload=true, which is for GPUs whose memory is full"
    if not args.skip_memory_metrics:
        return "with trainer.skip_memory_metrics=false, as both measure the peak of the memory"
    return ""


def keep_options(model: Any, kept: KeptLayers | None) -> None:
    """Makes the model's `gradient_checkpointing_enable` understand the options wherever it is called.

    kept: chooses the layers if the free memory decides.
    """
    enable = model.gradient_checkpointing_enable

    def with_options(gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any) -> None:
        given, kwargs = split(gradient_checkpointing_kwargs)
        given |= options
        if given["every_n_layers"] == "auto":
            given["every_n_layers"] = 1
        enable(gradient_checkpointing_kwargs=kwargs or None, **given)
        if kept:
            kept.install()

    model.gradient_checkpointing_enable = with_options
