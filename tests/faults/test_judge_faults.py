"""Whole runs whose judge goes down: none of its rollouts gets a verdict that nobody gave."""

from __future__ import annotations

import time
from typing import Any

import pytest
from judged_runs import ENV, KEY, KEY_ENV, QUICKSTART, Judge, check_verdicts, judging, settings
from whole_run import UNEVALUATED, Run

pytestmark = [pytest.mark.gym, pytest.mark.e2e, pytest.mark.timeout(900)]
STEPS = 3
SHORT = [*UNEVALUATED, f"trainer.max_steps={STEPS}"]
ONE_TRY = ["rollout.max_retries=0"]
DOWN_S = 30.0


def test_a_judge_that_is_down_for_a_while_delays_the_run_and_nothing_else(
    started, gym_python, fault, monkeypatch
):
    monkeypatch.setenv(KEY_ENV, KEY)
    with judging() as judge:
        run = started("judged", *SHORT, *settings(judge, *QUICKSTART))
        down = goes_down(run, judge, fault("A judge is down for 30 s"))
        time.sleep(DOWN_S)
        assert run.steps() == [1], "no step is done without the judge"
        judge.pause_s = 0.0
        judge.up()
        run.wait_for_step(2)
        down.over()
        assert run.ended_cleanly() == 0, run.said
        outcomes = [one for step in range(1, STEPS + 1) for one in run.rollouts(f"step-{step:06d}")]
        numbers = check_verdicts(judge, outcomes)
    assert len(numbers) > 10 and run.steps() == [1, 2, 3]
    assert judge.keys == {f"Bearer {KEY}"}


def test_a_judge_that_is_away_for_longer_costs_the_rollouts_that_it_did_not_judge(
    started, gym_python, fault, monkeypatch
):
    monkeypatch.setenv(KEY_ENV, KEY)
    with judging() as judge:
        run = started("longer", *SHORT, *settings(judge, *QUICKSTART), *ONE_TRY, "rollout.max_failed_share=1")
        away = goes_down(run, judge, fault("A judge is down for longer"))
        run.wait_for_step(2)  # no patience is left, and no retry
        away.over()
        judge.pause_s = 0.0
        judge.up()
        assert run.ended_cleanly() == 0, run.said
        steps = [run.rollouts(f"step-{step:06d}") for step in range(1, STEPS + 1)]
        numbers = check_verdicts(judge, [one for outcomes in steps for one in outcomes])
    assert numbers and [failures(outcomes) for outcomes in (steps[0], steps[2])] == [[], []]
    unjudged = failures(steps[1])
    assert unjudged and all(is_named(failed, judge) for failed in unjudged), unjudged
    [_, counted, _] = [entry for entry in run.metrics() if "loss" in entry]
    share = len(unjudged) / sum(task.startswith(ENV) for task in run.task_keys(2))
    assert counted[f"{ENV}/failed_environment"] == counted[f"{ENV}/failed"] == share


def test_a_judge_that_stays_away_ends_the_run_with_its_name(started, gym_python, fault, monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    with judging() as judge:
        run = started("left", *SHORT, *settings(judge, *QUICKSTART), *ONE_TRY)
        away = goes_down(run, judge, fault("A judge stays away"))
        assert run.ended_cleanly() == 1, run.said
        away.over()
        check_verdicts(judge, run.rollouts("step-000001"))
    [error] = [line for line in run.said.splitlines() if line.startswith("error: ")]
    assert f"environment in env.{ENV}, for example" in error
    assert f"{ENV}-user_judge: JudgeFailed: {judge.url}/v1/chat/completions cannot be reached" in error
    assert f"Look into {run.directory}/logs/{ENV}-user_judge.log" in run.said
    assert KEY not in run.said


def test_a_judge_that_takes_requests_and_never_answers_is_named_before_its_rollouts_time_is_over(
    started, gym_python, fault, monkeypatch
):
    monkeypatch.setenv(KEY_ENV, KEY)
    with judging() as judge:
        run = started("hangs", *SHORT, *settings(judge, *QUICKSTART), *ONE_TRY, f"env.{ENV}.timeout_s=20")
        run.wait_for_step(1)
        hangs = fault("A judge hangs")
        judge.pause_s = 1000.0
        assert run.ended_cleanly() == 1, run.said
        assert hangs.over() < 60
        check_verdicts(judge, run.rollouts("step-000001"))
    [error] = [line for line in run.said.splitlines() if line.startswith("error: ")]
    assert f"{ENV}-user_judge: JudgeFailed: {judge.url}/v1/chat/completions gave no answer within 1" in error
    assert "of the 20 s that a rollout has (env.<name>.timeout_s)" in error


def goes_down(run: Run, judge: Judge, fault: Any) -> Any:
    """The judge goes down after step 1, with requests on their way."""
    run.wait_for_step(1)
    judge.pause_s = 1.0
    asked = judge.asked
    run.wait_for(lambda: judge.asked > asked)
    fault.began = time.monotonic()
    judge.down()
    return fault


def failures(outcomes: list[dict]) -> list[dict]:
    return [outcome for outcome in outcomes if "cause" in outcome]


def is_named(failed: dict, judge: Judge) -> bool:
    said = f"{ENV}-user_judge: JudgeFailed: {judge.url}/v1/chat/completions cannot be reached"
    named = failed["detail"].startswith(said) and failed["log"].endswith(f"/logs/{ENV}-user_judge.log")
    return named and failed["cause"] == "environment" and failed["task"]["env"] == ENV
