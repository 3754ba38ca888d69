"""How much a run will play is known before it starts, and too few tasks are refused by name."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gymexp.config.schema import (
    DataConfig,
    DatasetConfig,
    EnvConfig,
    ModelConfig,
    OverlapConfig,
    RunConfig,
    SearchConfig,
)
from gymexp.data import prepare
from gymexp.data.prepare import Prepared
from gymexp.errors import ConfigError
from gymexp.gym import definitions, install
from gymexp.rollout.outcome import Task
from gymexp.run.train import train
from gymexp.sweep import kinds
from gymexp.training import arguments, schedule
from gymexp.training.schedule import Schedule


def config(train_size: int | None = None, sizes: dict[str, int | None] | None = None, **trainer) -> RunConfig:
    envs = {
        name: EnvConfig("c", "x", data=DataConfig(source="generate", train_size=size))
        for name, size in (sizes or {"e": 100}).items()
    }
    dataset = DatasetConfig(train_size=train_size)
    return RunConfig(model=ModelConfig("m", "p"), env=envs, dataset=dataset, trainer=trainer)


SIXTEEN = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 16}  # of 8 rollouts each


@pytest.mark.parametrize(
    ("made", "num_ranks", "said"),
    [
        (config(4, **SIXTEEN), 1, r"dataset\.train_size must be at least 16, .*, got 4: raise it, or make"),
        (
            config(31, **SIXTEEN),
            2,
            r"at least 32, the tasks of one batch of rollouts on 2 training proc.*got 31",
        ),
        (config(None, {"e": 15}, **SIXTEEN), 1, r"training set must have at least 16.*got 15.*train_size=16"),
        (
            config(None, {"a": 7, "b": 99}, **SIXTEEN),
            1,
            r"at least 16, .*, got 14: .*env\.<name>\.data\.train",
        ),
        (config(3, num_generations=2, steps_per_generation=1), 1, r"at least 4, .*got 3"),
        (config(3, num_generations=2, generation_batch_size=8), 1, r"at least 4, .*got 3"),
        (config(num_train_epochs=0), 1, r"trainer\.num_train_epochs must be a number > 0 .*got 0"),
        (config(num_train_epochs=math.nan), 1, r"num_train_epochs must be a number > 0 .*got nan"),
        (config(ignore_data_skip=True), 1, r"trainer\.ignore_data_skip must be false, .*got True"),
        (config(gradient_accumulation_steps=0), 1, r"gradient_accumulation_steps must be a whole.*got 0"),
    ],
)
def test_what_would_train_nothing_is_refused_from_the_configuration_alone(made, num_ranks, said):
    with pytest.raises(ConfigError, match=said):
        schedule.check(made, num_ranks)


def test_what_the_configuration_does_not_say_is_refused_once_the_tasks_are_counted():
    made = config(None, {"e": None}, **SIXTEEN)
    schedule.check(made, 1)
    with pytest.raises(ConfigError, match=r"the training set must have at least 16, .*, got 15"):
        schedule.check(made, 1, 15)
    assert schedule.check(made, 1, 16).batch_tasks == 16


def test_the_plan_says_what_is_played_and_what_is_not():
    mixed = [Task(f"{env}/train/{n}", env, "x", {}) for n in range(5) for env in ("a", "b")]
    made = config(None, {"a": 5, "b": 5}, per_device_train_batch_size=16, max_steps=3)
    assert schedule.plan(made, 1, mixed) == {
        "processes": 1,
        "tasks_per_batch": 2,
        "steps": 3,
        "tasks": 6,
        "epochs": 0.6,
        "played": {"a": 3, "b": 3},
    }
    made.trainer |= {"max_steps": -1, "num_train_epochs": 1.5}
    training_plan = schedule.plan(made, 2, mixed)
    assert (training_plan["steps"], training_plan["tasks"], training_plan["played"]) == (
        4,
        16,
        {"a": 5, "b": 5},
    )
    assert schedule.describe(training_plan, 10) == "training: 4 steps play 16 tasks: 1.60 epochs of 10"


def test_a_limit_that_keeps_the_engine_from_later_batches_is_named():
    """A step has 16 rollouts, a quarter of them of b; a lead of 2 has three batches at once."""
    mixed = [Task(f"{env}/train/{n}", env, "x", {}) for n in range(5) for env in ("a", "a", "a", "b")]
    made = config(None, {"a": 15, "b": 5}, per_device_train_batch_size=16, num_generations=4, max_steps=3)
    in_turn = schedule.plan(made, 1, mixed)
    assert schedule.remarks(made, in_turn, mixed, {"a": 1, "b": 1}) == []
    made.overlap = OverlapConfig(max_staleness=4, lead=2)
    assert schedule.remarks(made, in_turn, mixed, {"a": 36, "b": 12}) == []
    assert schedule.remarks(made, in_turn, mixed, {"a": 35, "b": 12}) == [
        "env.a has at most 35 rollouts in flight, where overlap.lead=2 plays about 36 of it at once: "
        "env.a.max_concurrency=36 lets them"
    ]


USES = st.fractions(Fraction(1, 8), 8, max_denominator=8)


@given(st.integers(1, 50), st.integers(1, 50), USES, st.integers(1, 40))
def test_whole_epochs_take_as_few_steps_as_play_every_task(num_tasks, batch, uses, epochs):
    made = Schedule(max(num_tasks, batch), batch, uses)
    steps = made.num_steps(epochs)
    assert made.num_batches(steps) * batch >= epochs * made.num_tasks
    assert (made.num_batches(steps - 1) - 1) * batch < epochs * made.num_tasks


@given(st.integers(1, 50), USES, st.integers(0, 10**6), st.integers(1, 4))
def test_a_run_that_goes_on_is_where_it_was_also_with_other_ranks(batch, uses, step, ranks):
    before = Schedule(10 * batch * ranks, batch * ranks, uses)
    assert before.resumed_at(step, before.epoch(step)) == before
    after = Schedule(before.num_tasks, batch, uses).resumed_at(step, before.epoch(step))
    assert after.epoch(step) == pytest.approx(before.epoch(step), abs=1 / before.num_tasks)


def test_too_few_tasks_end_a_run_before_its_directory_is_taken(tmp_path, monkeypatch):
    """What the configuration says, before NeMo Gym is asked for; else right after the tasks are there."""
    steps: list[str] = []
    tasks = [Task(f"e/train/{n}", "e", "x", {}) for n in range(3)]
    monkeypatch.setattr(arguments, "check", lambda *_: None)
    monkeypatch.setattr(definitions, "ensure_environments", lambda *_: steps.append("python"))
    monkeypatch.setattr(install, "site_packages", lambda *_: tmp_path)
    monkeypatch.setattr(prepare, "prepare", lambda *_: Prepared(tasks, {"e": []}, {}))
    for made, known in ((config(3, **SIXTEEN), []), (config(None, {"e": None}, **SIXTEEN), ["python"])):
        with pytest.raises(ConfigError, match=r"at least 16, .*, got 3"):
            train(made, [], tmp_path / "run")
        assert steps == known and not (tmp_path / "run").exists()


def test_a_sweep_says_so_of_a_job_but_leaves_a_trials_batch_to_its_study():
    made = config(3, **SIXTEEN)
    assert "dataset.train_size must be at least 16" in kinds._too_few_tasks(made)
    assert not kinds._too_few_tasks(config(16, **SIXTEEN))
    made.search = SearchConfig(num_trials=2, trial=0)
    assert not kinds._too_few_tasks(made)
