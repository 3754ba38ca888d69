"""Real Slurm: a job whose environment has a judge gets the judge's key, which no file of it has."""

from __future__ import annotations

import pytest
from judged_runs import ENV, KEY, KEY_ENV, check_verdicts, judging, settings
from whole_run import UNEVALUATED, rollouts_of, steps_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_a_judged_job_gets_the_key_from_the_shell_that_submits_it(submitted, monkeypatch):
    with judging() as judge:
        words = [*settings(judge, "sudoku"), *UNEVALUATED, "trainer.max_steps=2"]
        monkeypatch.delenv(KEY_ENV, raising=False)
        refused = submitted(*words)
        assert refused.ended() == 1
        assert f"env.{ENV}.judge.key_env={KEY_ENV} must name an environment variable" in refused.said
        assert not refused.entries(), "nothing is submitted"

        monkeypatch.setenv(KEY_ENV, KEY)
        sweep = submitted(*words)
        assert sweep.ended() == 0, sweep.said
        run = sweep.sweep / "0"
        assert steps_of(run) == [1, 2]
        outcomes = [one for step in (1, 2) for one in rollouts_of(run, f"step-{step:06d}")]
        assert check_verdicts(judge, outcomes)
    assert not [outcome for outcome in outcomes if "cause" in outcome]
    assert judge.keys == {f"Bearer {KEY}"}
    files = [path for path in sweep.sweep.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in sweep.said
