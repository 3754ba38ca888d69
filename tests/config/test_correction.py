"""`rollout.correction`: what auto means, which arguments of TRL's follow, and which contradict it."""

from __future__ import annotations

from typing import Any

import pytest

from gymexp.config.correction import complete, correction_of, problems_of_correction
from gymexp.config.schema import EnvConfig, ModelConfig, RolloutConfig, RunConfig, SearchConfig

CLIP = {"vllm_importance_sampling_clip_max": 3.0}


def config(
    correction: str = "auto", dtype: str = "bfloat16", searched: Any = None, **trainer: Any
) -> RunConfig:
    return RunConfig(
        model=ModelConfig("m", "p", dtype=dtype),
        env={"e": EnvConfig("c", "a")},
        trainer=trainer,
        rollout=RolloutConfig(correction=correction),
        search=SearchConfig(params={"trainer": searched} if searched else {}),
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (config(), "behavior"),
        (config(importance_sampling_level="sequence"), "decoupled"),
        (config(importance_sampling_level="sequence", dtype="float32"), "behavior"),
        (config(**CLIP), "decoupled"),
        (config(searched={"vllm_importance_sampling_clip_max": [2.0, 3.0]}), "decoupled"),
        (config("behavior", importance_sampling_level="sequence"), "behavior"),
        (config("none"), "none"),
        (config("decoupled", dtype="float32"), "decoupled"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_auto_is_ppos_clip_unless_trls_weights_are_asked_for_or_needed(given, meant):
    assert correction_of(given) == meant


def test_trls_weights_are_made_with_the_decoupled_correction_alone():
    on = "vllm_importance_sampling_correction"
    assert complete({"beta": 0.1}, "behavior") == complete({"beta": 0.1}, "none") == {"beta": 0.1, on: False}
    made = complete(CLIP, "decoupled")
    assert made == CLIP | {on: True, "vllm_importance_sampling_mode": "token_truncate"}
    assert complete({}, "decoupled")["vllm_importance_sampling_clip_max"] == 2.0


@pytest.mark.parametrize("correction", ["behavior", "none"])
@pytest.mark.parametrize("where", ["trainer", "searched"])
def test_arguments_of_trls_weights_are_refused_where_there_are_none(correction, where):
    given = config(correction, **CLIP) if where == "trainer" else config(correction, searched=CLIP)
    [problem] = problems_of_correction(given)
    assert problem == (
        f"trainer.vllm_importance_sampling_clip_max must be left out with rollout.correction={correction}, "
        "which has no importance weights of TRL's, got 3.0: say rollout.correction=decoupled"
    )
    assert not list(problems_of_correction(config("decoupled", **CLIP)))
    assert not list(problems_of_correction(config(**CLIP)))
