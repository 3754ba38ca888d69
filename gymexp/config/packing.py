"""The rules of `model.packing` and other keys. Those of the model are in `gymexp.training.packing_rules`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gymexp.config.schema import RunConfig
from gymexp.config.value_rules import one_of

PACKINGS = ("auto", "none", "varlen", "tree")
COMPILE_KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
_BACKENDS = ("inductor", "aot_eager", "eager")  # whose values tests compare with those of padded rows
_MODES = ("default", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Compilation:
    """The arguments of torch.compile."""

    backend: str
    mode: str | None


def compilation_of(config: RunConfig) -> Compilation | None:
    """Returns how gymexp compiles the layers for packs; None if it does not.

    As in transformers, `trainer.torch_compile_backend` or `torch_compile_mode` alone is enough.
    """
    if config.model.packing in ("auto", "none"):
        return None
    compiles, backend, mode = (config.trainer.get(key) for key in COMPILE_KEYS)
    if not compiles and backend is None and mode is None:
        return None
    return Compilation(backend or "inductor", mode)


def problems_of_packing(config: RunConfig) -> Iterator[str]:
    """Yields a problem for each key that does not go together with `model.packing`."""
    yield from one_of("model.packing", config.model.packing, PACKINGS)
    if config.model.packing not in ("auto", "none"):
        yield from problems_of_packs(config)


def problems_of_packs(config: RunConfig) -> Iterator[str]:
    """Yields a problem for each key that does not go together with packs."""
    model = config.model
    with_packs = f"with model.packing={model.packing}"
    if model.attn_implementation != "sdpa":
        yield (
            f"model.attn_implementation must be sdpa {with_packs}, which has an attention of its own, got "
            f"{model.attn_implementation!r}"
        )
    if config.trainer.get("use_liger_kernel"):
        yield f"trainer.use_liger_kernel must be false {with_packs}, which was not tried with it, got true"
    if compilation := compilation_of(config):
        yield from _compilation_problems(compilation, config.trainer, with_packs)


def _compilation_problems(
    compilation: Compilation, trainer: Mapping[str, Any], with_packs: str
) -> Iterator[str]:
    if compilation.backend not in _BACKENDS:
        yield (
            f"trainer.torch_compile_backend must be one of {', '.join(_BACKENDS)} {with_packs}, as no other "
            f"was compared with padded rows, got {compilation.backend!r}"
        )
    if compilation.mode not in (None, *_MODES):
        yield (
            f"trainer.torch_compile_mode must be one of {', '.join(_MODES)} {with_packs}, as the others "
            f"record a CUDA graph for each number of tokens, got {compilation.mode!r}"
        )
    if trainer.get("deepspeed"):
        yield (
            f"trainer.torch_compile must be false {with_packs} and trainer.deepspeed, with which it was not "
            "tried, got true: leave it out, or say trainer.fsdp=true instead of trainer.deepspeed"
        )
