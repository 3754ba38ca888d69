"""The trials of `engine.colocate=auto` as real runs: on a CPU they differ by the rollouts of a step."""

from __future__ import annotations

import dataclasses
import json
import sys

import psutil
import pytest
from whole_run import UNEVALUATED

from gymexp.config.load import from_yaml
from gymexp.data.prepare import load_prepared
from gymexp.record.directory import RunDirectory
from gymexp.run import placement_trial

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


def test_trials_are_runs_that_end_after_their_steps_and_leave_their_logs_and_metrics_alone(started, tmp_path):
    base = started("base", "trainer.max_steps=1", "trainer.warmup_steps=0", *UNEVALUATED)
    assert base.ended_cleanly() == 0, base.said
    config = from_yaml(base.directory / "config.yaml")
    prepared = load_prepared(base.directory / "data")
    more = dataclasses.replace(config, trainer=config.trainer | {"gradient_accumulation_steps": 8})
    broken = dataclasses.replace(
        config, engine=dataclasses.replace(config.engine, kind="vllm", python="/none")
    )
    run, said = RunDirectory.claim(tmp_path / "run"), []
    before = set(psutil.Process().children(recursive=True))
    chosen = placement_trial.faster(
        {"more": more, "broken": broken, "fewer": config}, run, prepared, said.append
    )
    assert chosen is config, said
    record = json.loads((run.path / "placement.json").read_text())
    assert record["chosen"] == "fewer"
    assert {name: len(one["steps_s"]) for name, one in record["tried"].items()} == {
        "more": 3, "broken": 0, "fewer": 3,
    }  # fmt: skip
    assert "engine.python" in record["tried"]["broken"]["error"]
    assert not set(psutil.Process().children(recursive=True)) - before, "no process is left"
    for name in ("more", "fewer"):
        trial = run.logs / f"trial_{name}"
        assert {path.name for path in trial.iterdir()} == {"metrics.jsonl", "logs", "train.log"}
        assert sum("fewer: step" in line for line in said) == 3
    assert not run.config.exists(), "the run itself has not begun"


def test_a_run_tries_both_placements_before_it_begins(started, commands, monkeypatch, tmp_path):
    """Of two GPUs that are said to be there, with a vLLM that ends at once."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    by_name = "*uuid*) printf '0, GPU-a, 9.0\\n1, GPU-b, 9.0\\n'"
    smi = f"case $1 in {by_name};; *) printf '0\\n1\\n';; esac"
    ends = 'if [ "$1" = -c ]; then echo 0.31.0; else echo "no such GPU"; exit 3; fi'
    commands(**{"nvidia-smi": smi, "no-vllm": ends})
    asked = ["engine=vllm", f"engine.python='{tmp_path / 'bin' / 'no-vllm'}'", "engine.colocate=auto"]
    run = started("auto", *asked, "model.dtype=float32", *UNEVALUATED)
    assert run.ended_cleanly() == 1, run.said
    for name in ("apart", "shared"):
        assert f"engine.colocate=auto: trying 3 steps {name}" in run.said
        assert (run.directory / "logs" / f"trial_{name}" / "train.log").read_text()
    assert "no trial trained 3 steps" in run.said
    assert not (run.directory / "config.yaml").exists()
