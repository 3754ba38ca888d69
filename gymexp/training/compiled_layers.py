"""`trainer.torch_compile` with `model.packing`: each decoder layer is compiled for packs.

A pack is one row of N tokens, and N differs from pack to pack. transformers compiles the whole model, which
would be compiled again for each N, up to torch's limit. Here N is a variable of the compiled code, and the
code of one layer serves all of them. So the number of compilations depends neither on the packs nor on the
number of layers.

The attention of packs stays outside of the compiled code (`packing._attend`). What is compiled are
projections, norms, rotary embedding and MLP. Gradient checkpointing and the hooks of FSDP and peft are around
`forward`, which is all that is replaced: the names of modules and weights stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch.fx.experimental import _config as shapes_config
from transformers.modeling_layers import GradientCheckpointingLayer

from gymexp.config.packing import Compilation


def compile_layers(model: Any, compilation: Compilation) -> None:
    """Makes each decoder layer compile itself when it first gets a pack. Other rows, such as those of the hf
    engine, are computed as before."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = _compiled_for_packs(layer.forward, compilation)


@contextmanager
def _any_size() -> Iterator[None]:
    """Keeps torch from taking equal sizes for the same size. Otherwise, if the first pack has as many tokens
    as a head has dimensions, its code is for packs of that many tokens alone.

    Nor is a layer split for DDP, which can send a layer's gradients after the backward pass of that layer.
    """
    shapes: Any = shapes_config
    with shapes.patch(use_duck_shape=False), dynamo_config.patch(optimize_ddp=False):
        yield


def _compiled_for_packs(forward: Callable[..., Any], compilation: Compilation) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=True, backend=compilation.backend, mode=compilation.mode)

    @functools.wraps(forward)
    def choose(*args: Any, packed_segments: Any = None, **options: Any) -> Any:
        if packed_segments is None:
            return forward(*args, **options)
        with _any_size():
            return compiled(*args, packed_segments=packed_segments, **options)

    return choose
