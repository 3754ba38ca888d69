"""A study shared by jobs: each gets values of its own, keeps them, and dead ones are given up."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from gymexp.config.schema import SearchConfig
from gymexp.record import optuna_study

pytest.importorskip("optuna")
PARAMS = {"trainer": {"learning_rate": {"low": 1e-7, "high": 1e-4, "log": True}, "num_generations": [8, 16]}}


def search(trial: int) -> SearchConfig:
    return SearchConfig(num_trials=4, trial=trial, params=PARAMS, prune=True, startup_trials=1)


def result(reward: float) -> dict:
    return {"step": 4, "stopped": False, "held_out": {"sudoku": {"reward": [0.1, reward]}}}


def test_jobs_at_once_get_values_of_their_own_and_a_job_that_starts_again_keeps_its(tmp_path):
    one, two = (optuna_study.begin(search(n), tmp_path / str(n)) for n in (0, 1))
    assert one.number != two.number and one.values != two.values
    assert 1e-7 <= one.values["trainer.learning_rate"] <= 1e-4
    assert optuna_study.begin(search(0), tmp_path / "0") == one


def _whole_trial(sweep: Path, num: int) -> tuple[int, dict]:
    trial = optuna_study.begin(search(num), sweep / str(num))
    optuna_study.Judge(search(num), sweep / str(num)).report(1, {"sudoku": {"reward": num / 10}})
    optuna_study.end(search(num), sweep / str(num), result(num / 10))
    return trial.number, trial.values


def test_processes_that_begin_at_the_same_time_share_one_study(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        trials = pool.starmap(_whole_trial, [(tmp_path, num) for num in range(8)], chunksize=1)
    assert sorted(number for number, _ in trials) == list(range(8))
    assert len({json.dumps(values) for _, values in trials}) == 8
    told = optuna_study.summary(tmp_path)
    assert told[0] == "study: 8 trials finished, 0 pruned"
    assert told[1].startswith("best trial: job 7 with 0.700")


def test_a_trial_whose_run_died_without_a_word_is_given_up_by_the_next_that_begins(tmp_path):
    for num in (0, 1):
        optuna_study.begin(search(num), tmp_path / str(num))
    for num, pid in ((0, 2**22 + 1), (1, os.getpid())):  # the first has no such process
        status = {"pid": pid, "began": 2**40, "ended": None}
        (tmp_path / str(num) / "status.json").write_text(json.dumps(status))
    optuna_study.begin(search(2), tmp_path / "2")
    for num, goes_on in ((0, False), (1, True)):
        before = optuna_study.read_trial(tmp_path / str(num))
        assert (optuna_study.begin(search(num), tmp_path / str(num)) == before) == goes_on


def test_a_trial_below_the_median_of_the_others_is_pruned_and_the_best_one_named(tmp_path):
    for num, reward in enumerate((0.9, 0.2)):
        optuna_study.begin(search(num), tmp_path / str(num))
        why = optuna_study.Judge(search(num), tmp_path / str(num)).report(1, {"sudoku": {"reward": reward}})
        optuna_study.end(search(num), tmp_path / str(num), result(reward) | ({"pruned": why} if why else {}))
        assert (why is not None) == (num == 1)
    told = optuna_study.summary(tmp_path)
    assert told[0] == "study: 1 trials finished, 1 pruned"
    assert told[1].startswith("best trial: job 0 with 0.900")


def test_a_policy_that_collapses_is_judged_by_what_it_is_and_not_by_what_it_was(tmp_path):
    for num, rewards in enumerate(((0.8, 0.8), (0.9, 0.1))):
        optuna_study.begin(search(num), tmp_path / str(num))
        judge = optuna_study.Judge(search(num), tmp_path / str(num))
        told = [judge.report(step, {"sudoku": {"reward": r}}) for step, r in enumerate(rewards, 1)]
        optuna_study.end(search(num), tmp_path / str(num), result(rewards[-1]))
        assert [why is not None for why in told] == [False, num == 1]


def test_a_trial_that_was_given_up_goes_on_as_a_new_one_of_the_same_values(tmp_path):
    first = optuna_study.begin(search(0), tmp_path / "0")
    optuna_study.end(search(0), tmp_path / "0", {})
    again = optuna_study.begin(search(0), tmp_path / "0")
    assert again.number != first.number and again.values == first.values
    optuna_study.end(search(0), tmp_path / "0", result(0.5))
    assert optuna_study.summary(tmp_path)[0] == "study: 1 trials finished, 0 pruned"
