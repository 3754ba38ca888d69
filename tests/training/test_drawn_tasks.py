"""Which tasks the real trainer plays if a curriculum draws them by what the policy achieved."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_trainer import config_of, save_policy
from transformers import TrainerCallback

from gymexp.config.schema import DatasetConfig, EnvConfig
from gymexp.data.prepare import Prepared
from gymexp.errors import RunDirectoryError
from gymexp.policy.model import load_model, load_tokenizer
from gymexp.rollout.collect import Stopped
from gymexp.rollout.outcome import Task
from gymexp.training import arguments, checkpoints
from gymexp.training.drawn_tasks import equal_groups
from gymexp.training.trainer import PolicyTrainer

GENERATIONS = 2
TASKS = [Task(f"{env}/train/{n:06d}", env, "x", {}) for env in ("a", "b") for n in range(5)]
SCHEDULE = {0: {"a": 1, "b": 0}, 12: {"a": 1, "b": 3}}
SMALL = {
    "num_generations": GENERATIONS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 14,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


class Rewarded:
    """Rollouts of made-up tokens. The tasks of even numbers are always solved, the others now and then."""

    seconds = 0.0

    stop_after = -1  # the number of batches after which a run is asked to end

    def __init__(self) -> None:
        self.played: list[tuple[int, list[str]]] = []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        step = trainer.state.global_step
        groups = [prompts[i : i + GENERATIONS] for i in range(0, len(prompts), GENERATIONS)]
        assert all(len(set(group)) == 1 for group in groups), "groups are whole"
        if len(self.played) == self.stop_after:
            raise Stopped
        self.played.append((step, prompts[::GENERATIONS]))
        return {
            "prompt_ids": [[5, 6]] * len(prompts),
            "completion_ids": [[7 + i, 9] for i in range(len(prompts))],
            "logprobs": [[-1.0, -1.0]] * len(prompts),
            "env_mask": [[1, 1]] * len(prompts),
            "reward": [float(i % 2 or int(key[-1]) % 2 == 0) for i, key in enumerate(prompts)],
        }

    def write_trained(self, batch: Any, trainer: Any) -> None: ...


class Until(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self._step = step
        self.logs: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == self._step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(logs)


def train(policy: Path, directory: Path, until: int | None = None, **trainer: Any) -> Any:
    """From the newest checkpoint to the end, or to step `until`. Returns what was played, by batch, and the
    log entries."""
    config = config_of(policy, **SMALL | trainer)
    config.env = {env: EnvConfig("c", "x") for env in ("a", "b")}
    config.dataset = DatasetConfig(schedule=SCHEDULE, sampling="difficulty")
    rollouts, stop = Rewarded(), Until(until)
    made = PolicyTrainer(
        config,
        arguments.build(config, directory),
        load_model(config.model),
        load_tokenizer(config.model),
        Prepared(TASKS, {}, {}),
        rollouts,  # type: ignore[arg-type]
        directory,
    )
    made.add_callback(stop)
    with contextlib.suppress(Stopped):
        made.train_from(checkpoints.latest(directory))
    made.save_now()
    return rollouts.played, stop.logs


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory) -> Any:
    return train(policy, tmp_path_factory.mktemp("whole"))


def test_always_solved_tasks_rest_and_the_schedule_is_followed_in_the_batches_and_the_metrics(whole):
    played, logs = whole
    steps = [entry for entry in logs if "a/share" in entry]
    assert [step for step, _ in played] == list(range(14)) == [round(e["epoch"] * 5) - 1 for e in steps]
    for (step, batch), entry in zip(played, steps, strict=True):
        assert entry["a/share"] == sum(key[0] == "a" for key in batch) / 2
        assert entry["b/weight"] == pytest.approx(
            (3 * step / 12 / (1 + 3 * step / 12)) if step < 12 else 0.75
        )
    times = Counter(key for _, batch in played for key in batch)
    assert times["a/train/000001"] > times["a/train/000002"], "an easy task is played less"
    assert max(entry["a/resting"] for entry in steps) == 3
    # Without rests each of the environment's tasks would come once before one comes again.
    by_env = [times[f"a/train/{n:06d}"] for n in range(5)]
    assert max(by_env) - min(by_env) > 1


def test_what_the_data_loader_reads_ahead_does_not_change_the_tasks(policy, tmp_path, whole):
    ahead = train(policy, tmp_path, dataloader_num_workers=1, dataloader_prefetch_factor=8)
    assert ahead[0] == whole[0]


@pytest.mark.parametrize(
    ("trainer", "stop_after", "num_begun"),
    [
        # A step of two batches: the second part plays steps 2 and 3, and the first batch of step 4.
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 5, 1),
        # A batch of three steps: the second part plays that of steps 3 to 5, and ends before the next.
        ({"steps_per_generation": 3}, 1, 0),
    ],
)
def test_a_run_that_ends_within_a_step_plays_it_again(
    policy, tmp_path, trainer, stop_after, num_begun, monkeypatch
):
    """The draws of a step that did not finish are not in its checkpoint; nor are those of its first batch."""
    whole, _ = train(policy, tmp_path / "whole", max_steps=8, **trainer)
    first, _ = train(policy, tmp_path / "parts", until=2, max_steps=8, **trainer)
    monkeypatch.setattr(Rewarded, "stop_after", stop_after)
    second, _ = train(policy, tmp_path / "parts", max_steps=8, **trainer)
    monkeypatch.undo()
    rest, _ = train(policy, tmp_path / "parts", max_steps=8, **trainer)
    assert first + second[: stop_after - num_begun] + rest == whole
    assert second[stop_after - num_begun :] == rest[:num_begun]


def test_a_run_that_is_resumed_twice_plays_what_the_undisturbed_one_plays(policy, tmp_path, whole):
    parts = [train(policy, tmp_path, until=until)[0] for until in (4, 9, None)]
    assert [one for part in parts for one in part] == whole[0]


def test_a_checkpoint_without_the_state_of_the_draws_is_named(policy, tmp_path):
    train(policy, tmp_path, until=1)
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "curriculum.json").unlink()
    files = json.loads((checkpoint / "complete.json").read_text())
    assert files.pop("curriculum.json"), "the manifest has the state"
    (checkpoint / "complete.json").write_text(json.dumps(files))
    with pytest.raises(RunDirectoryError, match=r"curriculum.json must have the state of the draws"):
        train(policy, tmp_path)


def test_groups_are_equal_by_their_rewards_alone():
    rewards: Sequence[float | None] = [1, 1, 0, 1, 0.5, 0.5, None, 1, None, None]
    assert equal_groups(rewards, 2) == [True, False, True, None, None]
    assert equal_groups([1, None, 1, 0, None, 1], 3) == [True, False]
