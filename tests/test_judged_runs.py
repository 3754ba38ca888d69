"""A whole run with a judge that is killed, and goes on."""

from __future__ import annotations

import os
import signal
import time

import pytest
from judged_runs import ENV, KEY, KEY_ENV, QUICKSTART, check_verdicts, judging, settings
from whole_run import UNEVALUATED

pytestmark = [pytest.mark.gym, pytest.mark.e2e, pytest.mark.timeout(900)]
STEPS = 3


def test_a_judged_run_that_was_killed_goes_on_with_its_judge_and_asks_for_the_key_again(
    started, gym_python, monkeypatch
):
    monkeypatch.setenv(KEY_ENV, KEY)
    with judging() as judge:
        short = [*UNEVALUATED, f"trainer.max_steps={STEPS}", "trainer.save_steps=1"]
        run = started("killed", *short, *settings(judge, *QUICKSTART))
        run.wait_for(lambda: (run.directory / "checkpoints" / "checkpoint-1" / "complete.json").exists())
        judge.pause_s = 30.0
        asked = judge.asked
        run.wait_for(lambda: judge.asked > asked)
        os.kill(run.process.pid, signal.SIGKILL)
        assert run.ended() == -signal.SIGKILL
        killed = time.monotonic()
        while run.left():
            assert time.monotonic() - killed < 10, f"still there: {run.left()}"
            time.sleep(0.05)
        judge.pause_s = 0.0

        monkeypatch.delenv(KEY_ENV)
        refused = started("killed", resume=True)
        assert refused.ended_cleanly() == 1
        assert f"env.{ENV}.judge.key_env={KEY_ENV} must name an environment variable" in refused.said

        monkeypatch.setenv(KEY_ENV, KEY)
        before = len(judge.given)
        again = started("killed", resume=True)
        assert again.ended_cleanly() == 0, again.said
        assert f"step 1/{STEPS}" not in again.said and run.steps() == [1, 2, 3]
        outcomes = [one for step in range(1, STEPS + 1) for one in run.rollouts(f"step-{step:06d}")]
        numbers = check_verdicts(judge, outcomes)
    assert not [outcome for outcome in outcomes if "cause" in outcome]
    assert min(numbers) < before <= max(numbers), "verdicts of both starts"
    assert judge.keys == {f"Bearer {KEY}"}
    files = [path for path in run.directory.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
