"""Whole runs of the tiny policy with each `rollout.correction`."""

from __future__ import annotations

import sys

import pytest
from whole_run import BATCH, UNEVALUATED

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
