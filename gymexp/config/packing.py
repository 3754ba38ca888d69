"""The rules of `model.packing` and other keys. Those of the model are in `gymexp.training.packing_rules`."""

from __future__ import annotations

from collections.abc import Iterator

from gymexp.config.schema import RunConfig
from gymexp.config.value_rules import one_of

PACKINGS = ("auto", "none", "varlen", "tree")


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
    for name in ("torch_compile", "use_liger_kernel"):
        if config.trainer.get(name):
            yield f"trainer.{name} must be false {with_packs}, which was not tried with it, got true"
