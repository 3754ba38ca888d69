"""The rules of `model.lora.*`. Those of the model are in `gymexp.policy.lora` and `gymexp.engine.adapter`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from gymexp.config.schema import LoraConfig, RunConfig
from gymexp.config.value_rules import at_least, one_of

MAX_RANK = 512  # vLLM's largest --max-lora-rank


def is_sent(lora: LoraConfig) -> bool:
    """Whether engine servers get the policy's adapter as it is, not merged into its weights."""
    return lora.r is not None and lora.sync == "adapter"


def problems_of_lora(config: RunConfig) -> Iterator[str]:
    """Yields a line for each rule that these keys break, with key, rule, value and fix."""
    lora = config.model.lora
    if lora.r is None and lora != LoraConfig():
        yield "model.lora.r must be the adapter's rank where other keys of model.lora are set, got None"
    yield from at_least("model.lora.r", lora.r, 1)
    yield from at_least("model.lora.lora_alpha", lora.lora_alpha, 1)
    if not 0 <= lora.lora_dropout < 1:
        yield f"model.lora.lora_dropout must be >= 0 and below 1, got {lora.lora_dropout!r}"
    if not _may_name_modules(lora.target_modules):
        yield (
            "model.lora.target_modules must be all-linear, a list of module names, or a regular expression, "
            f"got {lora.target_modules!r}"
        )
    yield from one_of("model.lora.sync", lora.sync, ("merged", "adapter"))
    if is_sent(lora):
        yield from _problems_of_sending(config)
    if lora.r is not None and config.trainer.get("sync_ref_model"):
        yield (
            "trainer.sync_ref_model must be false with model.lora, whose reference is the model without its "
            f"adapter, got {config.trainer['sync_ref_model']!r}"
        )


def _problems_of_sending(config: RunConfig) -> Iterator[str]:
    lora, engine = config.model.lora, config.engine
    assert lora.r is not None
    if lora.r > MAX_RANK:
        yield f"model.lora.r must be <= {MAX_RANK}, vLLM's limit, with model.lora.sync=adapter, got {lora.r}"
    if engine.urls:
        yield (
            "model.lora.sync must be merged with engine.urls, whose servers may have any weights: an adapter "
            "replaces none of them; got 'adapter'"
        )
    if engine.weights not in ("auto", "disk"):
        yield (
            "engine.weights must be auto or disk with model.lora.sync=adapter, which sends a file, got "
            f"{engine.weights!r}"
        )
    for name, value in engine.args.items():
        if str(name).lstrip("-").replace("-", "_") == "api_server_count" and value != 1:
            yield (
                f"engine.args.{name} must be left out with model.lora.sync=adapter, as vLLM then has one API "
                f"server, got {value!r}"
            )


def _may_name_modules(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(name, str) and name for name in value)
    try:
        return isinstance(value, str) and value != "" and bool(re.compile(value))
    except re.error:
        return False
