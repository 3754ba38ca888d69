"""What a study is told, what it decides, and which trials it gives up."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gymexp.cluster.slurm_states import SlurmState
from gymexp.config.schema import ModelConfig, RunConfig, SearchConfig
from gymexp.errors import ConfigError, Interrupted
from gymexp.record import optuna_study

optuna = pytest.importorskip("optuna")
RATE = {"low": 1e-7, "high": 1e-4, "log": True}
PARAMS = {"trainer": {"learning_rate": RATE, "num_generations": [8, 16]}}


def search(trial: int | None = 0, **more: Any) -> SearchConfig:
    said = {"num_trials": 4, "trial": trial, "params": PARAMS, "prune": True, "startup_trials": 1}
    return SearchConfig(**said | more)


def result(reward: float) -> dict:
    return {"step": 4, "stopped": False, "held_out": {"sudoku": {"reward": [0.1, reward]}}}


def trial_of(sweep: Path, num: int) -> Any:
    opened = optuna_study._open(sweep, search())
    known = optuna_study.read_trial(sweep / str(num))
    assert known is not None
    return opened.trials[known.number]


def whole(sweep: Path, num: int, *rewards: float, **more: Any) -> list[str | None]:
    optuna_study.begin(search(num, **more), sweep / str(num))
    judge = optuna_study.Judge(search(num, **more), sweep / str(num))
    told = [judge.report(step, {"sudoku": {"reward": reward}}) for step, reward in enumerate(rewards, 1)]
    optuna_study.end(search(num, **more), sweep / str(num), result(rewards[-1]))
    return told


@pytest.mark.parametrize(
    ("metric", "held_out", "value"),
    [
        ("reward", {"a": {"reward": 0.2}, "b": {"reward": 0.4}}, 0.3),
        ("reward", {"a": {"reward": 0.2}, "b": {"success": 0.4}}, 0.2),
        ("reward", {"a": {"reward": None}, "b": {"reward": 0.0}}, 0.0),
        ("b/success", {"a": {"success": 0.2}, "b": {"success": 0.4}}, 0.4),
        ("c/success", {"a": {"success": 0.2}}, None),
        ("reward", {}, None),
    ],
)
def test_a_score_is_one_environments_or_the_mean_of_all_that_have_it(metric, held_out, value):
    found = optuna_study.score(metric, held_out)
    assert found == (None if value is None else pytest.approx(value))


def test_a_trial_ends_as_its_run_did(tmp_path):
    ends = {
        0: result(0.5),
        1: result(0.2) | {"pruned": "why"},
        2: {},
        3: {"held_out": {"sudoku": {"x": [1, 2]}}},
    }
    for num, said in ends.items():
        optuna_study.begin(search(num), tmp_path / str(num))
        optuna_study.end(search(num), tmp_path / str(num), said)
    assert [trial_of(tmp_path, num).state.name for num in ends] == ["COMPLETE", "PRUNED", "FAIL", "FAIL"]
    assert trial_of(tmp_path, 0).value == 0.5, "what is measured after training"
    assert optuna_study.summary(tmp_path)[0] == "study: 1 trials finished, 1 pruned"


def test_ranges_and_choices_become_optunas(tmp_path):
    whole_numbers = optuna_study._distribution({"low": 1, "high": 9})
    assert type(whole_numbers).__name__ == "IntDistribution"
    assert (whole_numbers.step, whole_numbers.log) == (1, False)
    assert optuna_study._distribution({"low": 1, "high": 9, "step": 4}).step == 4
    assert optuna_study._distribution({"low": 1, "high": 9, "log": True}).log
    fraction = optuna_study._distribution({"low": 0, "high": 0.5, "step": 0.1})
    assert (type(fraction).__name__, fraction.low, fraction.high) == ("FloatDistribution", 0, 0.5)
    assert fraction.step == 0.1 and not fraction.log
    assert optuna_study._distribution(RATE).log and optuna_study._distribution(RATE).step is None
    assert optuna_study._distribution(["a", "b"]).choices == ("a", "b")


def test_only_enough_finished_trials_judge_and_only_after_the_warm_up(tmp_path):
    more = {"startup_trials": 2, "warmup_steps": 2}
    assert whole(tmp_path, 0, 0.9, 0.9, **more) == [None, None]
    assert whole(tmp_path, 1, 0.1, 0.1, **more) == [None, None], "one finished trial is too few"
    assert whole(tmp_path, 2, 0.1, 0.3, **more)[0] is None, "the first step is warm-up"
    told = whole(tmp_path, 3, 0.1, 0.2, **more)
    assert told == [None, "reward of 0.200 after step 2 is below the median of the other trials"]
    assert whole(tmp_path, 4, 0.1, 0.3, 0.0, **more) == [None, None, None], (
        "equal is not worse; a step of its own"
    )


def test_a_smaller_value_is_better_where_it_is_minimized_and_nothing_is_pruned_unasked(tmp_path):
    more = {"direction": "minimize"}
    whole(tmp_path, 0, 0.2, **more)
    assert whole(tmp_path, 1, 0.1, **more) == [None]
    told = whole(tmp_path, 2, 0.9, **more)
    assert told == ["reward of 0.900 after step 1 is above the median of the other trials"]
    assert optuna_study.summary(tmp_path)[1].startswith("best trial: job 1 with 0.100")
    assert whole(tmp_path, 3, 0.9, prune=False, **more) == [None]
    judge = optuna_study.Judge(search(3, **more), tmp_path / "3")
    assert judge.report(5, {"sudoku": {}}) is None and trial_of(tmp_path, 3).intermediate_values == {1: 0.9}


def test_the_summary_names_job_values_and_what_mattered(tmp_path):
    assert optuna_study.summary(tmp_path) == []
    for num in range(3):
        whole(tmp_path, num, 0.1 * num)
    assert len(optuna_study.summary(tmp_path)) == 2, "too few for importances"
    whole(tmp_path, 3, 0.9)
    told = optuna_study.summary(tmp_path)
    values = optuna_study.read_trial(tmp_path / "3").values
    said = f"trainer.learning_rate={values['trainer.learning_rate']:.3g}"
    said += f"  trainer.num_generations={values['trainer.num_generations']}"
    assert told[1] == f"best trial: job 3 with 0.900  ({said})"
    assert told[2].startswith("importance: trainer.") and "trainer.num_generations " in told[2]
    same = tmp_path / "same"
    for num in range(4):
        whole(same, num, 0.5)
    assert len(optuna_study.summary(same)) == 2, "no trial differs"


def test_the_same_seed_gives_the_first_trial_the_same_values(tmp_path):
    first, same, other = (
        optuna_study.begin(search(trial, seed=seed), tmp_path / f"{at}" / "0").values
        for at, (trial, seed) in enumerate([(0, 5), (0, 5), (1, 5)])
    )
    assert first == same != other
    assert optuna_study.begin(search(None, seed=6), tmp_path / "3" / "0").values == other, (
        "seed and number are added"
    )


@pytest.mark.parametrize(
    ("states", "given_up"),
    [
        (None, False),
        ({"7_0": SlurmState("PENDING")}, False),
        ({"7_0": SlurmState("RUNNING")}, False),
        ({"7_0": SlurmState("NODE_FAIL")}, True),
        ({}, True),
    ],
)
def test_a_trial_of_a_job_is_given_up_on_slurms_word_alone(tmp_path, monkeypatch, states, given_up):
    """Its files are old: the job waits to be started again, or is gone."""
    optuna_study.begin(search(0), tmp_path / "0")
    status = {"host": "elsewhere", "pid": 1, "began": time.time() - 9000, "ended": None, "job_id": "7_0"}
    (tmp_path / "0" / "status.json").write_text(json.dumps(status))
    asked: list[list[str]] = []
    monkeypatch.setattr(optuna_study, "slurm_states", lambda ids: asked.append(list(ids)) or states)

    os.utime(tmp_path / "0" / "status.json", (time.time() - 9000,) * 2)
    optuna_study.begin(search(1), tmp_path / "1")
    assert (trial_of(tmp_path, 0).state.name == "FAIL") is given_up
    assert asked == [["7_0"]]


@pytest.fixture
def config(monkeypatch) -> RunConfig:
    """Values are written beside it, not into it: that is configuration's, and has its own tests."""
    monkeypatch.setattr(optuna_study, "with_values", lambda config, values: replace(config, trainer=values))
    return RunConfig(name="n", model=ModelConfig(name="m", path="p"), search=search(0))


def test_a_run_that_is_no_trial_is_left_alone(tmp_path, config):
    config.search.trial = None
    train = optuna_study.as_trial(lambda *arguments: {"got": arguments})
    assert train(config, ["a=1"], tmp_path / "0", "more")["got"] == (config, ["a=1"], tmp_path / "0", "more")
    assert not (tmp_path / "study.journal").exists()


def test_a_trial_trains_with_its_values_and_its_end_is_told(tmp_path, config):
    seen: list[Any] = []

    @optuna_study.as_trial
    def train(*arguments: Any) -> dict:
        seen.extend(arguments)
        return result(0.5)

    assert train(config, ["a=1"], tmp_path / "0", "more") == result(0.5)
    values = optuna_study.read_trial(tmp_path / "0").values
    assert seen[0] == replace(config, trainer=values) and seen[2:] == [tmp_path / "0", "more"]
    assert seen[1] == ["a=1", *(f"{key}={value}" for key, value in values.items())]
    assert trial_of(tmp_path, 0).value == 0.5 and train.__name__ == "train"


def test_an_error_fails_the_trial_and_an_interruption_does_not(tmp_path, config):
    errors: list[Exception] = [Interrupted(15, "x"), ConfigError("x")]

    @optuna_study.as_trial
    def train(*arguments: Any) -> dict:
        raise errors.pop(0)

    with pytest.raises(Interrupted):
        train(config, [], tmp_path / "0")
    assert trial_of(tmp_path, 0).state.name == "RUNNING"
    config.resume = str(tmp_path / "0")
    with pytest.raises(ConfigError):
        train(config, [], tmp_path / "0")
    assert trial_of(tmp_path, 0).state.name == "FAIL"


def test_a_resumed_trial_is_one_though_the_command_line_does_not_say_so(tmp_path, config, monkeypatch):
    optuna_study.begin(config.search, tmp_path / "0")
    values = optuna_study.read_trial(tmp_path / "0").values
    monkeypatch.setattr(optuna_study, "resumed", lambda path, resume: config)
    said = RunConfig(name="n", model=ModelConfig(name="m", path="p"), resume=str(tmp_path / "0"))
    config.resume = said.resume
    seen: list[Any] = []
    train = optuna_study.as_trial(lambda *arguments: seen.append(arguments) or result(0.7))
    train(said, [], tmp_path / "0")
    assert seen == [(replace(config, trainer=values), [], tmp_path / "0")], (
        "no override: its configuration has them"
    )
    assert trial_of(tmp_path, 0).value == 0.7


def test_a_trial_that_goes_on_as_another_keeps_what_was_measured(tmp_path):
    optuna_study.begin(search(0), tmp_path / "0")
    optuna_study.Judge(search(0), tmp_path / "0").report(1, {"sudoku": {"reward": 0.4}})
    optuna_study.end(search(0), tmp_path / "0", {})
    first = trial_of(tmp_path, 0)
    optuna_study.begin(search(0), tmp_path / "0")
    again = trial_of(tmp_path, 0)
    assert again.number != first.number and again.state.name == "RUNNING"
    assert again.intermediate_values == first.intermediate_values == {1: 0.4}
    assert again.user_attrs["after"] == first.number


def test_without_optuna_a_summary_says_what_to_install_and_its_verbosity_stays(tmp_path, monkeypatch):
    before = optuna.logging.get_verbosity()
    optuna_study.begin(search(0), tmp_path / "0")
    assert optuna.logging.get_verbosity() == before and (tmp_path / "study.journal").exists()
    monkeypatch.setitem(sys.modules, "optuna", None)
    said = "study: to show its best trial, install Optuna: pip install 'gymexp[optuna]'"
    assert optuna_study.summary(tmp_path) == [said]
