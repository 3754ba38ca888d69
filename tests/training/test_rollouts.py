"""Rollouts for training and evaluation: seeds repeat, the engine rests between, files read back."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gymexp.config import EnvConfig, ModelConfig, RunConfig
from gymexp.errors import RolloutError, ServiceError
from gymexp.gym.client import Distribution
from gymexp.rollout.outcome import Completed, Failed, Rollout, Task, Turn
from gymexp.training.rollouts import Rollouts, seed_of

SOFTMAX = Distribution(temperature=1.0)
TASKS = {key: Task(key, "e", "a", {"large": "row"}) for key in ("e/train/0", "e/train/1")}


class Collector:
    """Plays at once; says what it was asked, and whether the engine was sampling."""

    def __init__(self, fail: bool = False, version: int | None = None) -> None:
        self.version = version
        self.samplings: list = []
        self.sampling = False
        self.fail = fail

    def collect(self, tasks, samplings, meanwhile):
        assert self.sampling, "the engine rests"
        self.samplings.append(samplings)
        if self.fail:
            return [Failed(task, "engine", "gone", "logs/gateway.log") for task in tasks]
        return [Completed(Rollout(task, [Turn([1], [2], [-0.5])], 1.0, [], self.version)) for task in tasks]


def rollouts(collector: Collector, directory, **settings) -> Rollouts:
    env = EnvConfig(config_path="c", agent="a", max_output_tokens=9)
    config = RunConfig(model=ModelConfig("m", "p"), env={"e": env}, seed=3, **settings)

    return Rollouts(config, collector, TASKS, directory, Engine(collector))  # type: ignore[arg-type]


class Trainer:
    """What `rollout_func` is given, as far as it is looked at: one process, the state, metrics."""

    pad_token_id = 0
    grpo = SimpleNamespace(temperature=1.0, num_generations=2)
    accelerator = SimpleNamespace(num_processes=1, process_index=0)

    def __init__(self) -> None:
        self.state = SimpleNamespace(global_step=0)

    def add_metrics(self, metrics: dict) -> None:
        pass

    def check_samples(self, outcomes: list) -> None:
        pass


def keys_in(path: Path) -> list[str]:
    lines = zstandard.decompress(path.read_bytes()).splitlines()
    return [orjson.loads(line)["rollout"]["task"]["key"] for line in lines]


class Engine:
    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    @contextmanager
    def sampling(self, version: int):
        self.collector.sampling = True
        try:
            yield
        finally:
            self.collector.sampling = False

    def tend(self) -> None:
        pass


@given(st.integers(), st.integers(0, 10**6) | st.none(), st.text(), st.integers(0, 64))
def test_a_seed_is_the_same_every_time_and_fits_every_engine(run_seed, step, key, index):
    seed = seed_of(run_seed, step, key, index)
    assert seed == seed_of(run_seed, step, key, index)
    assert 0 <= seed < 2**31


def test_seeds_differ_by_run_step_task_and_place_in_the_group():
    base = (0, 1, "e/train/0", 0)
    others = [(1, 1, "e/train/0", 0), (0, 2, "e/train/0", 0), (0, 1, "e/train/1", 0), (0, 1, "e/train/0", 1)]
    assert len({seed_of(*facts) for facts in [base, *others]}) == 5


def test_each_of_a_group_has_its_own_seed_and_another_step_has_others(tmp_path):
    collector = Collector()
    plays = rollouts(collector, tmp_path)
    keys = ["e/train/0", "e/train/0", "e/train/1"]
    for version in (0, 1):
        plays.play(keys, version, Distribution(temperature=0.8), held_out=False)
    first, second = collector.samplings
    assert len({sampling.seed for sampling in first + second}) == 6
    assert {(s.temperature, s.top_p, s.max_output_tokens) for s in first} == {(0.8, 1.0, 9)}


def test_held_out_tasks_are_played_with_the_same_seeds_every_time(tmp_path):
    collector = Collector()
    plays = rollouts(collector, tmp_path)
    asked = Distribution(temperature=1.0, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2)
    for version in (0, 30):
        plays.play(["e/train/0", "e/train/1"], version, asked, held_out=True)
    first, second = collector.samplings
    assert [one.seed for one in first] == [one.seed for one in second]
    [one, *_] = first
    assert (one.temperature, one.top_p, one.top_k, one.min_p, one.repetition_penalty) == (1, 0.9, 5, 0.1, 1.2)


def test_rollouts_of_other_weights_than_the_policys_end_the_run(tmp_path):
    plays = rollouts(Collector(version=4), tmp_path)
    assert plays.play(["e/train/0"], 4, SOFTMAX, held_out=True)
    with pytest.raises(ServiceError, match=r"e/train/0 was sampled with the weights of step 4, .* of step 5"):
        plays.play(["e/train/0"], 5, SOFTMAX, held_out=True)


def test_too_many_failures_end_the_run_and_the_engine_rests_again(tmp_path):
    collector = Collector(fail=True)
    with pytest.raises(RolloutError, match=r"2 of 2 rollouts failed(.|\n)*Look into logs/gateway\.log"):
        rollouts(collector, tmp_path).play(["e/train/0", "e/train/1"], 0, SOFTMAX, held_out=False)
    assert not collector.sampling


def test_a_rollout_file_has_an_outcome_a_line_without_the_tasks_row(tmp_path):
    collector = Collector()
    plays = rollouts(collector, tmp_path)
    outcomes = plays.play(["e/train/0", "e/train/1"], 0, SOFTMAX, held_out=False)
    plays.write("step-000001", [*outcomes, Failed(TASKS["e/train/0"], "timeout", "slow")])
    [path] = tmp_path.iterdir()
    assert path.name == "step-000001.jsonl.zst"
    records = [orjson.loads(line) for line in zstandard.decompress(path.read_bytes()).splitlines()]
    assert [record["outcome"] for record in records] == ["completed", "completed", "failed"]
    assert records[0]["rollout"]["task"] == {"key": "e/train/0", "env": "e", "agent": "a"}
    assert records[0]["rollout"]["turns"] == [{"prompt_ids": [1], "completion_ids": [2], "logprobs": [-0.5]}]
    assert (records[2]["cause"], records[2]["schema"]) == ("timeout", 1)


def test_a_step_that_plays_several_collections_has_them_all_in_its_file_each_with_its_own_seeds(tmp_path):
    collector, trainer = Collector(), Trainer()
    plays: Any = rollouts(collector, tmp_path)
    first, second = ["e/train/0"] * 2, ["e/train/1", "e/train/0"]
    for collection in (first, second):
        plays(collection, trainer)
    assert keys_in(tmp_path / "step-000001.jsonl.zst") == [*first, *second]
    trainer.state.global_step = 1
    plays(second, trainer)
    assert keys_in(tmp_path / "step-000002.jsonl.zst") == second
    assert keys_in(tmp_path / "step-000001.jsonl.zst") == [*first, *second]
    seeds = [sampling.seed for some in collector.samplings for sampling in some]
    assert len(set(seeds)) == len(seeds) == 6


def test_a_step_that_is_played_again_after_a_resume_has_the_same_seeds_and_replaces_its_file(tmp_path):
    collectors = Collector(), Collector()
    for collector in collectors:
        plays: Any = rollouts(collector, tmp_path)
        trainer = Trainer()
        for _ in range(2):
            plays(["e/train/0"] * 2, trainer)
    assert keys_in(tmp_path / "step-000001.jsonl.zst") == ["e/train/0"] * 4
    assert collectors[0].samplings == collectors[1].samplings
