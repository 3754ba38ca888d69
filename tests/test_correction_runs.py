"""Whole runs of the tiny policy with each `rollout.correction`, and in packs (`model.packing`)."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from whole_run import BATCH, TINY, UNEVALUATED

from gymexp.rollout.outcome import outcome_from_json
from gymexp.rollout.rollout_files import read_train_index, read_trained
from gymexp.rollout.tokens import flatten

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


@pytest.mark.parametrize("correction", ["behavior", "decoupled", "none"])
def test_a_run_measures_ratio_and_drift_at_every_step_and_records_the_trainers_values(started, correction):
    changes = [
        f"rollout.correction={correction}",
        "trainer.max_steps=2",
        "trainer.warmup_steps=0",
        *UNEVALUATED,
    ]
    run = started(correction, *changes)
    assert run.ended_cleanly() == 0, run.said
    entries = [entry for entry in run.metrics() if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert max(entry[name] for name in ("drift", "sudoku/drift", "workplace/drift")) < 1e-5
        assert entry["sampling/ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert entry["sampling/effective_sample_size"] == pytest.approx(1, abs=1e-5)
        assert entry.get("sampling/clipped") == (None if correction == "none" else 0)
    rows = read_train_index(run.directory / "rollouts")
    assert [row["number"] for row in rows] == list(range(BATCH)) * 2
    for row, record in zip(rows, [*run.rollouts("step-000001"), *run.rollouts("step-000002")], strict=True):
        _, _, mask, engine = flatten(outcome_from_json(record).rollout.turns)
        trained = read_trained(run.directory / "rollouts", row)
        assert [value is not None for value in trained["logprobs"]] == [bool(flag) for flag in mask]
        pairs = zip(trained["logprobs"], engine, mask, strict=True)
        assert max(abs(a - b) for a, b, flag in pairs if flag) < 1e-3
        assert (trained.get("weights") is None) == (correction != "decoupled")


def test_a_run_trains_in_packs_on_what_the_same_model_sampled_beside(started):
    """The hf engine has an attention of its own in the model that the trainer packs rows for."""
    run = started(
        "packed", "model.packing=tree", "trainer.max_steps=2", "trainer.warmup_steps=0", *UNEVALUATED
    )
    assert run.ended_cleanly() == 0, run.said
    entries = [entry for entry in run.metrics() if "loss" in entry]
    assert [entry["drift"] < 1e-5 for entry in entries] == [True, True]


def test_a_model_that_cannot_be_packed_is_refused_before_the_run_starts(started, tmp_path):
    copy = shutil.copytree(TINY, tmp_path / "tiny")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    run = started("refused", "model.packing=varlen", f"model.path={copy}", *UNEVALUATED)
    assert run.ended_cleanly() == 1
    assert "model.packing must be none" in run.said and "attention_dropout of 0.1" in run.said
    assert not run.directory.exists()
