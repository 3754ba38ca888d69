"""The keys of `trainer.gradient_checkpointing_kwargs` that are transformers' own. `every_n_layers` says which
layers the backward pass computes again, `offload` whether the node's memory keeps their inputs meanwhile.

transformers' Trainer takes them out of the arguments before torch gets these. TRL switches checkpointing off
and on again around its passes without a gradient, and does not (1.16).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LAYER_OPTIONS = {"every_n_layers": 1, "offload": False}  # with the values that they have if left out


def split(kwargs: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options of the layers, and the arguments of `torch.utils.checkpoint`."""
    given = dict(kwargs or {})
    return {name: given.pop(name, default) for name, default in LAYER_OPTIONS.items()}, given


def check(kwargs: Mapping[str, Any], has_gpu: bool) -> None:
    """Raises ValueError if an option of the layers has no valid value. has_gpu: whether a GPU trains."""
    options, _ = split(kwargs)
    every, offload = options["every_n_layers"], options["offload"]
    key = "trainer.gradient_checkpointing_kwargs"
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"{key}.every_n_layers must be an integer >= 1, got {every!r}")
    if not isinstance(offload, bool):
        raise ValueError(f"{key}.offload must be true or false, got {offload!r}")
    if offload and not has_gpu:
        raise ValueError(f"{key}.offload must be false where no GPU trains, got true")


def keep_options(model: Any) -> None:
    """Makes the model's `gradient_checkpointing_enable` understand the options wherever it is called."""
    enable = model.gradient_checkpointing_enable

    def with_options(gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any) -> None:
        given, kwargs = split(gradient_checkpointing_kwargs)
        enable(gradient_checkpointing_kwargs=kwargs or None, **given | options)

    model.gradient_checkpointing_enable = with_options
