"""`engine.colocate=auto` without GPUs: what the two configurations are, and which one is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gymexp.config.schema import EngineConfig, PlacementConfig, RunConfig
from gymexp.errors import ConfigError, ServiceError
from gymexp.run import placement_trial
from gymexp.run.placement_trial import Tried


def config(rollout_gpus: int | None = None, **trainer: int) -> RunConfig:
    engine = EngineConfig(kind="vllm", colocate="auto")
    placement = PlacementConfig(rollout_gpus=rollout_gpus)
    return placement_trial.apart(RunConfig(engine=engine, placement=placement, trainer=trainer))


@pytest.mark.parametrize(
    ("num_gpus", "rollout_gpus", "trainer", "expected"),
    [
        (2, None, {"gradient_accumulation_steps": 16}, {"gradient_accumulation_steps": 8}),
        (2, None, {"gradient_accumulation_steps": 4, "steps_per_generation": 8},
         {"gradient_accumulation_steps": 2, "steps_per_generation": 4}),
        (4, 1, {"gradient_accumulation_steps": 4}, {"gradient_accumulation_steps": 3}),  # 3 x 4 = 4 x 3
        (4, 2, {"gradient_accumulation_steps": 1}, "gradient_accumulation_steps must be a multiple of 2"),
        (2, None, {"gradient_accumulation_steps": 2, "steps_per_generation": 3},
         "steps_per_generation must be a multiple of 2"),
    ],
)  # fmt: skip
def test_a_step_has_as_many_rollouts_on_shared_gpus(num_gpus, rollout_gpus, trainer, expected):
    gpus = [str(number) for number in range(num_gpus)]
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=f"trainer.{expected} with engine.colocate=auto"):
            placement_trial.shared(config(rollout_gpus, **trainer), gpus)
        return
    shared = placement_trial.shared(config(rollout_gpus, **trainer), gpus)
    assert shared and shared.engine.colocate is True and shared.placement.rollout_gpus is None
    assert shared.trainer == expected


@pytest.mark.parametrize(("gpus", "kind"), [([], "vllm"), (["0"], "vllm"), (["0", "1"], "hf")])
def test_where_there_is_nothing_to_choose_nothing_is_tried(gpus, kind):
    one = config()
    assert placement_trial.shared(replace(one, engine=replace(one.engine, kind=kind)), gpus) is None


class Directory:
    def __init__(self, path):
        self.path, self.logs = path, path / "logs"


def faster(monkeypatch, tmp_path, **tried: Tried):
    monkeypatch.setattr(placement_trial, "_try", lambda name, *_: tried[name])
    said: list[str] = []
    ways = {name: RunConfig(name=name) for name in tried}
    chosen = placement_trial.faster(ways, Directory(tmp_path), None, said.append)  # type: ignore[arg-type]
    return chosen.name, json.loads((tmp_path / "placement.json").read_text()), said


def test_the_faster_one_is_kept_by_the_steps_after_the_first(monkeypatch, tmp_path):
    name, record, said = faster(
        monkeypatch, tmp_path, apart=Tried([1.0, 9.0, 7.0]), shared=Tried([90.0, 5.0, 6.0])
    )
    assert name == record["chosen"] == "shared"
    assert record["tried"]["apart"] == {"steps_s": [1.0, 9.0, 7.0], "error": ""}
    assert (
        said[-1] == "engine.colocate=auto: a step took 8.0 s apart and 5.5 s shared; the run goes on shared"
    )


def test_one_that_fails_is_told_and_the_other_kept(monkeypatch, tmp_path):
    name, record, said = faster(
        monkeypatch, tmp_path, apart=Tried([1.0, 9.0, 7.0]), shared=Tried([2.0], "it ended with 1: no memory")
    )
    assert name == "apart" and record["tried"]["shared"]["error"]
    assert "shared: it ended with 1: no memory" in said


def test_two_that_fail_end_the_run_with_both_reasons(monkeypatch, tmp_path):
    with pytest.raises(ServiceError, match=r"(?s)no trial trained 3.*apart: no vLLM.*shared: no memory"):
        faster(monkeypatch, tmp_path, apart=Tried([], "no vLLM"), shared=Tried([1.0], "no memory"))
