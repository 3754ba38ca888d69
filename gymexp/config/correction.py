"""How the loss treats the difference between engine and trainer: `rollout.correction`, and the arguments of
TRL's that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gymexp.config.grpo_arguments import value_of
from gymexp.config.schema import RunConfig
from gymexp.config.value_rules import one_of

CORRECTIONS = ("auto", "behavior", "decoupled", "none")
_OF_TRL = "vllm_importance_sampling_"  # the arguments of TRL's correction begin with this
# TRL's own default weighs whole rollouts and drops those with a weight above 3: at 0.03 nats a token and
# 4,000 tokens this leaves an effective sample of 18 %.
_TRL_DEFAULTS = {f"{_OF_TRL}mode": "token_truncate", f"{_OF_TRL}clip_max": 2.0}


def correction_of(config: RunConfig) -> str:
    """Returns `rollout.correction`: behavior, decoupled or none. `auto` is decided here.

    Whoever sets an argument of TRL's correction wants that correction. The ratio of a whole rollout is
    clipped within a few ten-thousandths, which is less than what an engine in 16 bits rounds. Otherwise PPO's
    clip bounds the ratio to the engine's probabilities, which costs no pass of its own.
    """
    if config.rollout.correction != "auto":
        return config.rollout.correction
    level = value_of(config.trainer, "importance_sampling_level")
    rounds = level == "sequence" and config.model.dtype != "float32"
    return "decoupled" if rounds or _given(config) else "behavior"


def problems_of_correction(config: RunConfig) -> Iterator[str]:
    """Yields a problem if the value is unknown, and for each argument of TRL's that it does without."""
    correction = config.rollout.correction
    yield from one_of("rollout.correction", correction, CORRECTIONS)
    if correction not in ("behavior", "none"):
        return
    for name, value in _given(config).items():
        yield (
            f"trainer.{name} must be left out with rollout.correction={correction}, which has no importance "
            f"weights of TRL's, got {value!r}: say rollout.correction=decoupled"
        )


def complete(trainer: Mapping[str, Any], correction: str) -> dict[str, Any]:
    """Returns `trainer.*` with the arguments of TRL's correction. correction: of `correction_of`."""
    if correction != "decoupled":
        return {**trainer, f"{_OF_TRL}correction": False}
    return {**_TRL_DEFAULTS, **trainer, f"{_OF_TRL}correction": True}


def _given(config: RunConfig) -> dict[str, Any]:
    """Returns the arguments of TRL's correction that the user sets, or that a study searches."""
    searched = config.search.params.get("trainer", {})
    given = {**(searched if isinstance(searched, Mapping) else {}), **config.trainer}
    return {str(name): value for name, value in given.items() if str(name).startswith(_OF_TRL)}
