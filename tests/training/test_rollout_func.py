"""Rollouts for training and evaluation: seeds repeat, the engine rests between, files read back."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gymexp.config.schema import EnvConfig, ModelConfig, RolloutConfig, RunConfig
from gymexp.errors import RolloutError, ServiceError
from gymexp.rollout.outcome import Completed, Failed, Rollout, Task, Truncated, Turn
from gymexp.rollout.play import Distribution
from gymexp.rollout.rollout_files import (
    RolloutWriter,
    read_index,
    read_outcomes,
    read_train_index,
    read_trained,
)
from gymexp.training.ranks import on_main_rank
from gymexp.training.rollout_func import Rollouts, seed_of
from gymexp.training.trained_values import trained_of

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

    writer = RolloutWriter(directory, config.env)
    return Rollouts(config, collector, TASKS, writer, Engine(collector))  # type: ignore[arg-type]


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
    return [record["rollout"]["task"]["key"] for record in read_outcomes(path)]


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
        plays.play(keys, version, Distribution(temperature=0.8), held_out=False, keep=list)
    first, second = collector.samplings
    assert len({sampling.seed for sampling in first + second}) == 6
    assert {(s.temperature, s.top_p, s.max_output_tokens) for s in first} == {(0.8, 1.0, 9)}


def test_held_out_tasks_are_played_with_the_same_seeds_every_time(tmp_path):
    collector = Collector()
    plays = rollouts(collector, tmp_path)
    distribution = Distribution(temperature=1.0, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2)
    for version in (0, 30):
        plays.play(["e/train/0", "e/train/1"], version, distribution, held_out=True, keep=list)
    first, second = collector.samplings
    assert [one.seed for one in first] == [one.seed for one in second]
    [one, *_] = first
    assert (one.temperature, one.top_p, one.top_k, one.min_p, one.repetition_penalty) == (1, 0.9, 5, 0.1, 1.2)


def test_rollouts_of_other_weights_than_the_policys_end_the_run(tmp_path):
    plays = rollouts(Collector(version=4), tmp_path)
    assert plays.play(["e/train/0"], 4, SOFTMAX, held_out=True, keep=list)
    with pytest.raises(ServiceError, match=r"e/train/0 was sampled with the weights of step 4, .* of step 5"):
        plays.play(["e/train/0"], 5, SOFTMAX, held_out=True, keep=list)


def test_too_many_failures_end_the_run_and_the_engine_rests_again(tmp_path):
    collector = Collector(fail=True)
    plays, kept = rollouts(collector, tmp_path), []
    with pytest.raises(RolloutError, match=r"2 of 2 rollouts failed(.|\n)*Look into logs/gateway\.log"):
        plays.play(["e/train/0", "e/train/1"], 0, SOFTMAX, held_out=False, keep=kept.extend)
    assert not collector.sampling
    assert [one.detail for one in kept] == ["gone", "gone"], "they say why the run ended"


def test_a_step_whose_failures_end_the_run_is_on_disk(tmp_path):
    plays = rollouts(Collector(fail=True), tmp_path)
    with pytest.raises(RolloutError):
        plays._play_for_all(["e/train/0", "e/train/0"], Trainer(), 0)  # type: ignore[arg-type]
    assert [row["cause"] for row in read_index(tmp_path)] == ["engine", "engine"]
    assert len(list(read_outcomes(tmp_path / "step-000001.jsonl.zst"))) == 2


def test_a_rollout_file_has_an_outcome_a_line_without_the_tasks_row(tmp_path):
    collector = Collector()
    plays = rollouts(collector, tmp_path)
    outcomes = plays.play(["e/train/0", "e/train/1"], 0, SOFTMAX, held_out=False, keep=list)
    plays.write("step-000001", [*outcomes, Failed(TASKS["e/train/0"], "timeout", "slow")], group_size=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.jsonl", "step-000001.jsonl.zst"]
    records = list(read_outcomes(tmp_path / "step-000001.jsonl.zst"))
    assert [record["outcome"] for record in records] == ["completed", "completed", "failed"]
    assert records[0]["rollout"]["task"] == {"key": "e/train/0", "env": "e", "agent": "a"}
    assert records[0]["rollout"]["turns"] == [
        {"prompt_ids": [1], "completion_ids": [2], "logprobs": [-0.5], "versions": []}
    ]
    assert (records[2]["cause"], records[2]["schema"]) == ("timeout", 2)


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
    for step in range(3):
        collectors = Collector(), Collector()
        for collector in collectors:
            plays: Any = rollouts(collector, tmp_path)
            trainer = Trainer()
            trainer.state.global_step = step
            for _ in range(2):
                plays(["e/train/0"] * 2, trainer)
        assert keys_in(tmp_path / f"step-{step + 1:06d}.jsonl.zst") == ["e/train/0"] * 4
        assert collectors[0].samplings == collectors[1].samplings


class Accelerator:
    """One of two ranks, of which the first one acts first. sent: what it tells the other; parts: the tensors
    that it scatters."""

    def __init__(self, process_index: int, sent: list, parts: list) -> None:
        self.num_processes = 2
        self.process_index = process_index
        self.is_main_process = process_index == 0
        self.sent, self.parts = sent, parts

    def broadcast(self, box: list) -> None:
        if self.is_main_process:
            self.sent[:] = box
        box[:] = self.sent

    def scatter(self, tensor: torch.Tensor, scatter_list: list[torch.Tensor] | None = None) -> None:
        if scatter_list is not None:
            self.parts[:] = scatter_list
        tensor.copy_(self.parts[self.process_index])

    def connect(self, patch: pytest.MonkeyPatch) -> None:
        """Gives this rank's calls of torch.distributed and accelerate to this object."""
        patch.setattr("accelerate.utils.broadcast_object_list", self.broadcast)
        patch.setattr("torch.distributed.scatter", self.scatter)
        patch.setattr("torch.distributed.get_backend_config", lambda: "cpu:gloo")


class RankTrainer:
    pad_token_id = 0

    def __init__(self, accelerator: Accelerator, step: int = 4) -> None:
        self.accelerator = accelerator
        self.state = SimpleNamespace(global_step=step)
        self.grpo = SimpleNamespace(temperature=0.6, num_generations=2)
        self.metrics: dict[str, float] = {}
        self.checked: list = []

    def add_metrics(self, metrics) -> None:
        self.metrics |= metrics

    def check_samples(self, outcomes) -> None:
        self.checked.append(outcomes)


class Numbered(Collector):
    """Every rollout says another token, and its reward is its number."""

    def collect(self, tasks, samplings, meanwhile):
        self.samplings.append(samplings)
        self.tasks = tasks
        return [
            Completed(Rollout(task, [Turn([7], [number], [-0.5])], float(number), [], 4))
            for number, task in enumerate(tasks)
        ]


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Both ranks of a step, the first one first: what `rollout_func` returns on each, and what they did."""

    def run(*prompts: list[str], collector: Collector, step: int = 4, **settings):
        sent: tuple[list, list] = [], []
        batches, trainers = [], []
        for index, own in enumerate(prompts):
            accelerator = Accelerator(index, *sent)
            accelerator.connect(monkeypatch)
            monkeypatch.setattr("accelerate.utils.gather_object", lambda _: [*prompts[0], *prompts[1]])
            plays = rollouts(collector if index == 0 else None, tmp_path, **settings)
            trainers.append(RankTrainer(accelerator, step))
            batches.append(plays(own, trainers[-1]))
            assert 0 < plays.seconds < 60
        return batches, trainers

    return run


def test_each_rank_trains_on_the_rollouts_of_its_own_prompts(ranks, tmp_path):
    collector = Numbered()
    first, second = ["e/train/0"] * 2, ["e/train/1"] * 2
    batches, trainers = ranks(first, second, collector=collector)
    assert batches[0] == {
        "prompt_ids": [[7], [7]],
        "completion_ids": [[0], [1]],
        "logprobs": [[-0.5], [-0.5]],
        "env_mask": [[1], [1]],
        "reward": [0.0, 1.0],
    }
    assert [batch["completion_ids"] for batch in batches] == [[[0], [1]], [[2], [3]]]
    assert [batch["reward"] for batch in batches] == [[0.0, 1.0], [2.0, 3.0]]
    assert [len(batch["prompt_ids"]) for batch in batches] == [2, 2]
    assert [task.key for task in collector.tasks] == [*first, *second], "the first rank plays for all"
    for trainer, keys in zip(trainers, (first, second), strict=True):
        [outcomes] = trainer.checked
        assert [outcome.rollout.task.key for outcome in outcomes] == keys
    assert trainers[0].metrics["e/rollouts"] == 4 and trainers[0].metrics["groups_without_variance"] == 0
    assert trainers[1].metrics == {}, "counted once"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["index.jsonl", "step-000005.jsonl.zst"], "the step that they are for, counted from 1"


def test_what_ends_the_first_rank_ends_the_other_with_the_same_words(ranks, tmp_path):
    with pytest.raises(RolloutError) as first:
        ranks(["e/train/0"], ["e/train/1"], collector=Failing())
    sent = [None, first.value]
    accelerator = Accelerator(1, sent, [])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RolloutError) as second:
        accelerator.connect(patch)
        on_main_rank(accelerator, lambda: pytest.fail("the first rank's work"))  # type: ignore[arg-type]
    assert second.value is first.value


class Failing(Collector):
    def collect(self, tasks, samplings, meanwhile):
        return [Failed(task, "engine", "gone", "logs/gateway.log") for task in tasks]


def test_training_samples_at_the_trainers_temperature_with_draws_of_its_own_in_every_step(ranks):
    collector = Numbered()
    for step in (4, 5):
        with pytest.raises(ServiceError) if step == 5 else nullcontext():  # sampled by step 4's weights
            ranks(["e/train/0"] * 2, ["e/train/1"] * 2, collector=collector, step=step)
    first, second = collector.samplings
    assert {sampling.temperature for sampling in first} == {0.6}
    assert len({sampling.seed for sampling in first + second}) == 8
    assert [sampling.seed for sampling in first] == [
        seed_of(3, 4, key, place) for key in ("e/train/0", "e/train/1") for place in (0, 1)
    ]


def test_what_was_cut_is_trained_on_only_where_the_configuration_says_so(ranks):
    class Cut(Collector):
        def collect(self, tasks, samplings, meanwhile):
            return [
                Truncated(Rollout(t, [Turn([1], [2, 3], [-0.5, -0.5])], 1.0, []), "length") for t in tasks
            ]

    for truncated, mask in (("scored", [1, 1]), ("masked", [0, 0])):
        (batch, _), _ = ranks(
            ["e/train/0"], ["e/train/1"], collector=Cut(), rollout=RolloutConfig(truncated=truncated)
        )
        assert batch["env_mask"] == [mask]


def test_one_process_plays_by_itself():
    alone = SimpleNamespace(num_processes=1)
    assert on_main_rank(alone, lambda: 5) == 5  # type: ignore[arg-type]


def test_while_rollouts_are_played_the_engine_is_tended_and_a_file_is_there_whole_or_not_at_all(tmp_path):
    collector = Collector()
    plays = rollouts(collector, tmp_path)
    seen = []
    collector.collect = lambda tasks, samplings, meanwhile: seen.append(meanwhile) or []  # type: ignore[method-assign]
    plays.play(["e/train/0"], 0, SOFTMAX, held_out=False, keep=list)
    assert seen == [plays._engine.tend]
    plays.write("step-000001", [], group_size=2)
    plays.write("step-000001", [Failed(TASKS["e/train/0"], "timeout", "slow")], group_size=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.jsonl", "step-000001.jsonl.zst"]


def test_held_out_tasks_have_other_draws_than_training_has(tmp_path):
    collector = Collector()
    plays = rollouts(collector, tmp_path)
    for held_out in (True, False):
        plays.play(["e/train/0"], 0, SOFTMAX, held_out=held_out, keep=list)
    [[held], [trained]] = collector.samplings
    assert held.seed == seed_of(3, None, "e/train/0", 0) != trained.seed == seed_of(3, 0, "e/train/0", 0)


def test_a_file_that_could_not_be_written_to_its_end_is_not_there(tmp_path, monkeypatch):
    def fill_the_disk(path, data):
        path.open("wb").write(data[:3])
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        rollouts(Collector(), tmp_path).write("step-000001", [], group_size=2)
    assert list(tmp_path.glob("*.zst")) == []


def batch_of(numbers: list[int], widths: int = 3) -> dict[str, torch.Tensor]:
    """What TRL returns for one-token rollouts whose numbers of the run are these, padded to `widths`."""
    mask = torch.zeros(len(numbers), widths)
    mask[:, 0] = 1
    of_row = torch.tensor(numbers)[:, None].expand(-1, widths)
    return {"completion_mask": mask, "advantages": of_row[:, 0] / 10, "old_per_token_logps": -of_row / 100}


def trained_in(directory: Path, name: str) -> list[tuple[str, float | None, list[float] | None]]:
    """(task, advantage, log-probabilities) of each rollout of a file, in the order of the rollouts' index."""
    rows = {row["number"]: row for row in read_train_index(directory) if row["file"] == name}
    index = [row for row in read_index(directory) if row["file"] == name]
    assert list(rows) == [row["number"] for row in index]
    records = [read_trained(directory, rows[row["number"]]) for row in index]
    return [(row["key"], r["advantage"], r["logprobs"]) for row, r in zip(index, records, strict=True)]


def test_what_each_rank_made_of_its_rollouts_is_kept_with_these_rollouts(tmp_path, monkeypatch):
    """Two ranks; a step of two collections; one rollout fails. The number of a rollout is in its values."""
    first, second = ["e/train/0"] * 2, ["e/train/1"] * 2

    class OneFails(Collector):
        def collect(self, tasks, samplings, meanwhile):
            outcomes = super().collect(tasks, samplings, meanwhile)
            return [*outcomes[:2], Failed(tasks[2], "engine", "gone"), outcomes[3]]

    sent: tuple[list, list] = [], []
    ranks: list[Any] = []
    for index in range(2):
        settings = {"rollout": RolloutConfig(max_failed_share=0.5)}
        plays: Any = rollouts(OneFails(), tmp_path, **settings)
        if index:
            plays._writer = plays._collector = None
        ranks.append((plays, RankTrainer(Accelerator(index, *sent))))
    for collection in range(2):
        parts = []
        for (plays, trainer), own in zip(ranks, (first, second), strict=True):
            trainer.accelerator.connect(monkeypatch)
            monkeypatch.setattr("accelerate.utils.gather_object", lambda _: [*first, *second])
            plays(own, trainer)
        for index, (plays, _) in enumerate(ranks):
            numbers = [4 * collection + 2 * index + i for i in range(2)]
            parts += trained_of(batch_of(numbers), plays._rows)
        for index, (plays, trainer) in reversed([*enumerate(ranks)]):
            own_part = parts[2 * index : 2 * index + 2]

            def gathered(accelerator, own, own_part=own_part, parts=parts):
                assert [one.advantage for one in own] == [one.advantage for one in own_part]
                return parts if accelerator.is_main_process else []

            monkeypatch.setattr("gymexp.training.rollout_func.gathered_on_main_rank", gathered)
            plays.write_trained(batch_of([4 * collection + 2 * index + i for i in range(2)]), trainer)
    keys = [*first, *second] * 2
    expected: list[Any] = [(keys[n], n / 10, [pytest.approx(-n / 100)]) for n in range(8)]
    for failed in (2, 6):
        expected[failed] = (keys[failed], None, None)
    assert trained_in(tmp_path, "step-000005") == expected


def test_a_step_keeps_a_value_a_token_up_to_a_bound_and_its_advantages_always(tmp_path, monkeypatch):
    monkeypatch.setattr("gymexp.training.rollout_func._MAX_KEPT_TOKENS", 3)
    plays, trainer = rollouts(Collector(), tmp_path), Trainer()
    for step, kept in ((0, 2), (0, 1), (1, 2)):
        trainer.state.global_step = step
        plays(["e/train/0"] * 2, trainer)  # type: ignore[arg-type]
        plays.write_trained(batch_of([1, 2]), trainer)  # type: ignore[arg-type]
        rows = [row for row in read_train_index(tmp_path) if row["file"] == f"step-{step + 1:06d}"]
        assert sum(read_trained(tmp_path, row)["logprobs"] is not None for row in rows[-2:]) == kept
        assert [row["advantage"] for row in rows[-2:]] == [0.1, 0.2]


def test_the_tracker_gets_rollouts_of_training_with_their_advantages_and_held_out_ones_at_once(tmp_path):
    sent: list[Any] = []
    plays, trainer = rollouts(Collector(), tmp_path), Trainer()
    plays._send = lambda name, outcomes, advantages: sent.append((name, len(outcomes), advantages))
    plays(["e/train/0"] * 2, trainer)  # type: ignore[arg-type]
    assert sent == []
    plays.write_trained(batch_of([1, 2]), trainer)  # type: ignore[arg-type]
    plays.write("eval-000001", plays.play(["e/train/1"], 1, SOFTMAX, held_out=True, keep=list), 2)
    assert sent == [("step-000001", 2, [0.1, 0.2]), ("eval-000001", 1, None)]
