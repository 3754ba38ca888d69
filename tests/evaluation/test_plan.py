"""What decides an evaluation's results is in its fingerprint, and what does not decide them is not."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from whole_run import TINY

from gymexp.config.schema import EnvConfig, EvaluationConfig, ModelConfig, RunConfig
from gymexp.errors import RunDirectoryError
from gymexp.evaluation.plan import EndpointPlan, Plan, Policy, fingerprint, row_hash, weights_digest
from gymexp.rollout.outcome import Task

CONFIG = RunConfig(
    model=ModelConfig("tiny", "here"), env={"sudoku": EnvConfig("a.yaml", "agent")}, seed=3,
    evaluation=EvaluationConfig(temperature=0.5),
)  # fmt: skip
PLAN = Plan([Policy("model", "tiny", "eval-000000", digest="d1")], 4, "validation")
WARMER = EvaluationConfig(temperature=0.6)
SHORTER = ModelConfig("tiny", "here", max_model_len=99)
TRAINED = dataclasses.replace(PLAN.policies[0], digest="d2")
TASKS = [Task("sudoku/validation/0", "sudoku", "agent", {"b": 1, "a": [2]})]


def changed(config: RunConfig = CONFIG, plan: Plan = PLAN, tasks: list[Task] = TASKS) -> set[str]:
    """The names of the fingerprint that differ from the first one's."""
    one, other = fingerprint(CONFIG, PLAN, TASKS), fingerprint(config, plan, tasks)
    return {name for name in one | other if one.get(name) != other.get(name)}


def env(**fields) -> RunConfig:
    return dataclasses.replace(CONFIG, env={"sudoku": dataclasses.replace(CONFIG.env["sudoku"], **fields)})


def test_nothing_changed_is_the_same():
    assert changed() == set()


@pytest.mark.parametrize(
    ("differs", "named"),
    [
        ({"config": dataclasses.replace(CONFIG, seed=4)}, "seed"),
        ({"config": dataclasses.replace(CONFIG, evaluation=WARMER)}, "evaluation.temperature"),
        ({"config": env(max_output_tokens=9)}, "env.sudoku"),
        ({"config": dataclasses.replace(CONFIG, model=SHORTER)}, "model.max_model_len"),
        ({"plan": dataclasses.replace(PLAN, samples=5)}, "samples"),
        ({"plan": dataclasses.replace(PLAN, policies=[TRAINED])}, "policy tiny"),
        ({"tasks": [dataclasses.replace(TASKS[0], row={"b": 2, "a": [2]})]}, "tasks"),
    ],
)  # fmt: skip
def test_what_decides_the_results_is_named(differs, named):
    assert changed(**differs) == {named}


def test_how_many_are_played_at_once_decides_nothing():
    assert changed(env(max_concurrency=1, replicas=3, memory_budget_mb=100.0)) == set()


def test_a_row_is_the_same_whatever_the_order_of_its_fields():
    other = dataclasses.replace(TASKS[0], row={"a": [2], "b": 1})
    assert row_hash(other) == row_hash(TASKS[0])
    assert row_hash(dataclasses.replace(TASKS[0], row={"a": [2], "b": 1.5})) != row_hash(TASKS[0])


def test_a_plan_reads_back_and_another_directory_is_refused(tmp_path):
    endpoint = EndpointPlan("http://x/v1", "m", "KEY", 5.0)
    plan = dataclasses.replace(PLAN, endpoint=endpoint, fingerprint={"seed": "3"})
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan
    with pytest.raises(RunDirectoryError, match="has no evaluation"):
        Plan.read(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "chat_template.jinja"])
def test_the_digest_of_weights_sees_every_file_that_decides_a_sample(tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(TINY, copy)
    assert weights_digest(copy) == weights_digest(TINY)
    (copy / "trainer_state.json").write_text("{}")
    (copy / "optimizer.pt").write_text("")
    assert weights_digest(copy) == weights_digest(TINY), "training's own files decide nothing"
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    assert weights_digest(copy) != weights_digest(TINY)
