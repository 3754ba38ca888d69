"""Training samples from the policy's softmax and an evaluation from what it asks for, down to the request."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from gymexp.config.schema import EnvConfig, EvaluationConfig, ModelConfig, RunConfig
from gymexp.data.prepare import Prepared
from gymexp.rollout.outcome import Completed, Rollout, Task, Turn
from gymexp.rollout.play import Distribution, Sampling, request_body
from gymexp.rollout.rollout_files import RolloutWriter
from gymexp.training.callbacks import Evaluation, held_out_distribution
from gymexp.training.rollout_func import Rollouts
from gymexp.training.spans import Spans

TASK = Task("e/0", "e", "a", {"responses_create_params": {"input": [], "temperature": 0.3, "top_p": 0.2}})
ASKED = {"temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "repetition_penalty": 1.2}


class Collector:
    def __init__(self) -> None:
        self.samplings: list[Sampling] = []

    def collect(self, tasks: Any, samplings: Any, meanwhile: Any) -> list[Any]:
        self.samplings = samplings
        return [Completed(Rollout(task, [Turn([1], [2], [-0.5])], 1.0, [])) for task in tasks]


class Engine:
    def sampling(self, version: int) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def tend(self) -> None:
        pass


class Trainer(SimpleNamespace):
    """What Rollouts and Evaluation ask of a PolicyTrainer."""

    def __init__(self, temperature: float) -> None:
        accelerator = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)
        super().__init__(
            grpo=SimpleNamespace(temperature=temperature, num_generations=1),
            accelerator=accelerator,
            pad_token_id=0,
        )
        self.state = SimpleNamespace(global_step=0)
        self.spans = Spans()
        self.batch_tasks = SimpleNamespace(holding=nullcontext)

    def add_metrics(self, metrics: Any) -> None: ...
    def check_samples(self, outcomes: Any) -> None: ...
    def sync_weights(self) -> None: ...
    def log_evaluation(self, metrics: Any, seconds: float) -> None: ...


def played(tmp_path: Any, evaluation: EvaluationConfig, *, held_out: bool, monkeypatch: Any) -> Sampling:
    """What the one rollout of a training step, or of an evaluation, is sampled with."""
    config = RunConfig(
        model=ModelConfig("m", "p"),
        env={"e": EnvConfig("c", "a", max_output_tokens=9)},
        evaluation=evaluation,
    )
    collector = Collector()
    rollouts = Rollouts(config, collector, {TASK.key: TASK}, RolloutWriter(tmp_path, config.env), Engine())  # type: ignore[arg-type]
    trainer: Any = Trainer(temperature=0.8)
    if held_out:
        reporter: Any = SimpleNamespace(report=lambda **_: None)
        callback = Evaluation(config, Prepared([], {"e": [TASK]}, {}), rollouts, reporter)
        callback.trainer = trainer
        callback.run(0)
    else:
        monkeypatch.setattr("accelerate.utils.gather_object", lambda some: some)
        rollouts([TASK.key], trainer)
    [sampling] = collector.samplings
    return sampling


def test_training_samples_from_the_softmax_at_its_temperature_whatever_an_evaluation_asks_for(
    tmp_path, monkeypatch
):
    sampling = played(tmp_path, EvaluationConfig(**ASKED), held_out=False, monkeypatch=monkeypatch)
    assert sampling == Sampling(temperature=0.8, max_output_tokens=9, seed=sampling.seed)
    body = json.loads(request_body(TASK, sampling))["responses_create_params"]
    assert (body["temperature"], body["top_p"]) == (0.8, 1.0), "whatever the row says"
    assert json.loads(body["metadata"]["extra_body"]) == {"seed": sampling.seed, "play": sampling.play}


@pytest.mark.parametrize("greedy", [False, True])
def test_an_evaluation_samples_from_what_it_asks_for(tmp_path, monkeypatch, greedy):
    evaluation = EvaluationConfig(temperature=0.0) if greedy else EvaluationConfig(**ASKED)
    sampling = played(tmp_path, evaluation, held_out=True, monkeypatch=monkeypatch)
    body = json.loads(request_body(TASK, sampling))["responses_create_params"]
    extra = json.loads(body["metadata"]["extra_body"])
    assert (extra.pop("seed"), extra.pop("play")) == (sampling.seed, sampling.play)
    found = {"temperature": body["temperature"], "top_p": body["top_p"]} | extra
    assert found == ({"temperature": 0.0, "top_p": 1.0} if greedy else ASKED)


def test_an_evaluation_that_asks_for_nothing_samples_as_training_does():
    assert held_out_distribution(EvaluationConfig(), 0.8) == Distribution(temperature=0.8)
