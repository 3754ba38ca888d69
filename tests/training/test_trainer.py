"""What gymexp adds to TRL's trainer, at its seams: weights to the engine, phases, checkpoints, the end."""

from __future__ import annotations

import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_trainer import MadeUp, build_trainer, logprobs_of, save_policy
from torch import nn

from gymexp.config.load import to_yaml
from gymexp.config.schema import DataConfig, EnvConfig, LoraConfig
from gymexp.policy.checkpoint_model import materialize, write_adapter
from gymexp.training import checkpoints
from gymexp.training.drift import without_dropout
from gymexp.training.trained_values import Row, trained_of


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def build(policy, tmp_path_factory):
    """A trainer of the small policy that has not trained yet."""
    return lambda **more: build_trainer(
        policy, tmp_path_factory.mktemp("run") / "checkpoints", MadeUp(), **more
    )


class Sync:
    """What the servers were sent: (version, specs, tensors)."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, Any, dict[str, torch.Tensor]]] = []

    def update(self, version, specs, weights) -> None:
        self.sent.append((version, specs, dict(weights)))


class Servers:
    def __init__(self, sync: Sync | None, shared: bool = False) -> None:
        self.sync = sync
        self.shared = shared
        self.named_weights: Any = None

    def load_since_last(self) -> dict[str, float]:
        return {}


def test_weights_are_sent_where_the_engine_has_other_ones_and_not_twice(build):
    trainer, sync = build(), Sync()
    trainer.sync_weights()
    assert sync.sent == [], "the hf engine has the model itself"
    trainer.sample_with_servers(Servers(sync), version=0)
    trainer.sync_weights()
    assert sync.sent == [], "they began with these"
    trainer.state.global_step = 1
    before = trainer._seconds["sync"]
    trainer.sync_weights()
    trainer.sync_weights()
    assert [version for version, *_ in sync.sent] == [1]
    assert trainer._seconds["sync"] > before
    trainer.state.global_step = 2
    trainer.sync_weights()
    assert [version for version, *_ in sync.sent] == [1, 2]


def test_servers_that_hold_unknown_weights_or_that_have_slept_are_sent_them_at_once(build):
    for version, shared, times in ((None, False, 1), (0, True, 2)):
        trainer, sync = build(), Sync()
        trainer.sample_with_servers(Servers(sync, shared), version=version)
        trainer.sync_weights()
        trainer.sync_weights()
        assert [sent for sent, *_ in sync.sent] == [0] * times


def test_a_rank_without_a_part_in_sending_walks_over_the_weights_all_the_same(build, monkeypatch):
    trainer, seen = build(), []
    trainer.sample_with_servers(Servers(None), version=None)
    named = type(trainer).named_weights
    monkeypatch.setattr(
        type(trainer), "named_weights", lambda self: (seen.append(n) or (n, t) for n, t in named(self))
    )
    trainer.sync_weights()
    names = [name for name, _ in trainer.model.named_parameters()]
    assert seen == names * 2, "their shapes, and they themselves"
    assert trainer._engine_version == 0


def test_what_is_sent_has_the_checkpoints_names_and_the_models_dtype(build):
    trainer, sync = build(dtype="bfloat16"), Sync()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}, "the optimizer's"
    trainer.sample_with_servers(Servers(sync), version=None)
    trainer.sync_weights()
    [(_, specs, tensors)] = sync.sent
    assert {dtype for _, dtype, _ in specs} == {torch.bfloat16} == {t.dtype for t in tensors.values()}
    assert specs == [(name, t.dtype, list(t.shape)) for name, t in tensors.items()]
    own = dict(trainer.model.named_parameters())
    assert tensors.keys() == own.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, own[name].detach().to(torch.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_an_adapter_that_is_sent_as_one_nothing_else_is_sent_and_its_zeros_come_first(build, dtype):
    trainer, sync = build(dtype=dtype, lora=LoraConfig(r=4, sync="adapter")), Sync()
    trainer.sample_with_servers(Servers(sync), version=None)
    trainer.sync_weights()
    [(version, specs, tensors)] = sync.sent
    assert version == 0 and not any(t.any() for name, t in tensors.items() if "lora_B" in name)
    assert specs == [(name, t.dtype, list(t.shape)) for name, t in tensors.items()]
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}, "the optimizer's"
    assert tensors.keys() == {name.replace(".default.", ".") for name in trained}
    for name, parameter in trained.items():
        expected = parameter.detach().to(getattr(torch, dtype))
        assert torch.equal(tensors[name.replace(".default.", ".")], expected)


def test_an_engine_that_is_back_is_given_the_weights_by_one_rank_if_it_has_them_whole(build, monkeypatch):
    trainer = build()
    servers = Servers(Sync())
    trainer.sample_with_servers(servers, version=0)
    assert dict(servers.named_weights()).keys() == dict(trainer.model.named_parameters()).keys()
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert dict(servers.named_weights()), "every rank has all of them"
    monkeypatch.setattr(type(trainer._dist), "is_fsdp", True)
    assert servers.named_weights() is None


def test_a_log_entry_says_where_the_steps_seconds_went(build, monkeypatch):
    trainer, logged = build(logging_steps=2), []
    monkeypatch.setattr("trl.GRPOTrainer.log", lambda self, logs, start_time=None: logged.append(dict(logs)))
    clock = iter([100.0])
    monkeypatch.setattr("gymexp.training.trainer.time.monotonic", lambda: next(clock))
    trainer._step_began = 90.0
    trainer._seconds |= {"rollout": 4.0, "sync": 1.0, "update": 2.0}
    trainer.log({"loss": 0.5})
    assert logged == [
        {
            "loss": 0.5,
            "time/step": 5.0,
            "time/rollout": 2.0,
            "time/sync": 0.5,
            "time/logprobs": 0.0,
            "time/update": 1.0,
            "time/evaluation": 0.0,
            "time/other": 1.5,
        }
    ]
    assert set(trainer._seconds.values()) == {0.0} and trainer._step_began == 100.0
    trainer.log({"train_runtime": 3.0})
    assert logged[1] == {"train_runtime": 3.0}


class Slow(MadeUp):
    """Rollouts that last long against everything else in a step."""

    def __call__(self, prompts, trainer):
        time.sleep(1.0)
        self.seconds = 1.0
        return super().__call__(prompts, trainer)


def test_a_wait_for_rollouts_to_check_counts_as_a_wait_for_rollouts(policy, tmp_path, monkeypatch):
    def wait(self, trainer, in_backward):
        time.sleep(0.1 * in_backward)
        return 0.1 * in_backward

    monkeypatch.setattr("gymexp.training.drift.Checks.before_update", wait)
    trainer = build_trainer(policy, tmp_path, MadeUp(), max_steps=1, gradient_accumulation_steps=4)
    entries: list[dict] = []
    trainer.log = lambda logs, start=None: (type(trainer).log(trainer, logs, start), entries.append(logs))  # type: ignore[method-assign]
    trainer.train_from(None)
    assert entries[0]["time/rollout"] == pytest.approx(0.4, abs=0.01), "four micro-batches"


def test_the_parts_of_a_step_are_measured_and_do_not_overlap(policy, tmp_path):
    trainer = build_trainer(policy, tmp_path, Slow(), learning_rate=1e-3, max_steps=2)
    entries: list[dict] = []
    trainer.log = lambda logs, start=None: (type(trainer).log(trainer, logs, start), entries.append(logs))  # type: ignore[method-assign]
    trainer.train_from(None)
    for entry in [entry for entry in entries if "loss" in entry]:
        parts = {name: value for name, value in entry.items() if name.startswith("time/")}
        assert parts["time/rollout"] == pytest.approx(1.0, abs=0.1)
        assert parts["time/update"] > 0 and parts["time/logprobs"] > 0
        whole = parts.pop("time/step")
        assert whole == pytest.approx(sum(parts.values()))
        assert min(parts.values()) >= 0, "a second that counts twice is missing from the others"


class Kept(MadeUp):
    """Keeps what the records get, in the order of its rollouts, with the log-probabilities at that time."""

    def write_trained(self, batch, trainer):
        rows = [Row(len(row["completion_ids"]), True, True) for row in self.rows]
        self.trained = trained_of(batch, rows)
        self.own = [logprobs_of(trainer, row) for row in self.rows]


@pytest.mark.parametrize("mode", ["behavior", "none", "token_truncate", "sequence_truncate"])
def test_the_records_get_each_rollouts_own_values_before_trl_shuffles_them(policy, tmp_path, mode):
    """Every rollout has another reward, length, mask and tokens, so that values of another one are seen.
    mode: of TRL's weights against the mismatch with servers, or a correction without any."""
    rollouts = Kept(own_logprobs=True, noise=0.3)
    weighs = mode not in ("behavior", "none")
    more = {"vllm_importance_sampling_mode": mode} if weighs else {"correction": mode}
    trainer = build_trainer(policy, tmp_path, rollouts, beta=0.1, num_iterations=2, **more)
    if weighs:
        trainer.sample_with_servers(Servers(None), version=0)  # type: ignore[arg-type]
    trainer.train_from(None)
    rewards = torch.tensor([row["reward"] for row in rollouts.rows]).view(-1, 4)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert [one.advantage for one in rollouts.trained] == pytest.approx(
        advantages.flatten().tolist(), abs=1e-5
    )
    for row, one, own in zip(rollouts.rows, rollouts.trained, rollouts.own, strict=True):
        sampled = [i for i, flag in enumerate(row["env_mask"]) if flag]
        assert one.num_trained == len(sampled) and len(one.logprobs) == len(own)
        for values in (one.logprobs, one.ref_logprobs):
            assert [i for i, value in enumerate(values) if value == value] == sampled
            assert [values[i] for i in sampled] == pytest.approx([own[i] for i in sampled], abs=2e-4)
        ratios = [math.exp(own[i] - row["logprobs"][i]) for i in sampled]
        assert one.max_ratio == pytest.approx(max(ratios), rel=1e-3)
        bound = trainer.vllm_importance_sampling_clip_max
        if not weighs:
            assert one.weights is None
        elif mode == "token_truncate":
            expected = [min(ratio, bound) for ratio in ratios]
            assert [one.weights[i] for i in sampled] == pytest.approx(expected, rel=1e-3)
        else:
            assert one.weights == pytest.approx(min(math.prod(ratios), bound), rel=2e-3)


def test_the_spans_of_a_step_cover_it_and_never_overlap(policy, tmp_path):
    trainer = build_trainer(policy, tmp_path, Slow(), max_steps=2, save_strategy="steps", save_steps=1)
    spans: list[dict] = []
    trainer.spans.report = spans.append
    trainer.train_from(None)
    for step in (1, 2):
        names = [span["span"] for span in spans if span["step"] == step]
        order = [name for name in dict.fromkeys(names) if name != "update" or names[0] != "update"]
        assert {"rollout", "update", "checkpoint"} <= set(names) and order[0] in ("rollout", "logprobs")
        played = [s["seconds"] for s in spans if s["step"] == step and s["span"] == "rollout"]
        assert 1.0 <= max(played) <= sum(played) < 2.0
    spans.sort(key=lambda span: span["time"])
    for span, later in pairwise(spans):
        assert span["time"] + span["seconds"] <= later["time"] + 0.002
    whole = spans[-1]["time"] + spans[-1]["seconds"] - spans[0]["time"]
    assert 0.9 * whole <= sum(span["seconds"] for span in spans) <= whole + 0.01


def test_an_evaluations_entry_is_its_own_and_its_seconds_are_the_steps(build, monkeypatch):
    trainer, logged = build(), []
    monkeypatch.setattr("transformers.Trainer.log", lambda self, logs, start_time=None: logged.append(logs))
    trainer.add_metrics({"drift": 0.5})
    trainer.log_evaluation({"eval_e/reward": 1.0}, 3.0)
    assert logged == [{"eval_e/reward": 1.0}]
    assert trainer._seconds["evaluation"] == 3.0
    assert trainer._metrics["train"]["drift"] == [0.5], "still to come with the step's"


def test_a_checkpoint_of_now_is_written_once_and_sealed(build):
    trainer = build(save_strategy="no")
    directory: Path = trainer._directory
    directory.mkdir(exist_ok=True)
    trainer.save_now()
    assert list(directory.iterdir()) == [], "nothing has been trained yet"
    trainer.create_optimizer_and_scheduler(num_training_steps=3)
    for step in (1, 2):
        trainer.state.global_step = step
        trainer.save_now()
    assert checkpoints.step_of(checkpoints.latest(directory)) == 2
    target = directory / "checkpoint-2"
    assert checkpoints.whole(target)
    written = (target / "trainer_state.json").stat().st_mtime_ns
    trainer.save_now()
    assert (target / "trainer_state.json").stat().st_mtime_ns == written, "it is there already"
    (target / "complete.json").unlink()
    trainer.save_now()
    assert checkpoints.whole(target), "one that was not finished is written again"


def test_which_checkpoints_stay_follows_the_last_evaluation(build):
    trainer = build()
    directory: Path = trainer._directory
    directory.mkdir(exist_ok=True)
    trainer._config.checkpoint.keep_last, trainer._config.checkpoint.keep_best = 1, 1
    trainer.create_optimizer_and_scheduler(num_training_steps=3)
    metrics = directory.parent / "metrics.jsonl"
    for step, reward in ((1, 0.9), (2, 0.1), (3, 0.2)):
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "eval_e/reward": reward}) + "\n")
        trainer.state.global_step = step
        trainer.save_now()
    kept = sorted(path.name for path in directory.glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-3"]


def test_the_final_weights_are_the_trained_ones_in_the_models_dtype(build, tmp_path):
    trainer = build(dtype="bfloat16")
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(1.0)
    trainer.save_policy(tmp_path)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"], trainer.model.lm_head.weight.detach().to(torch.bfloat16))
    assert (tmp_path / "model" / "tokenizer_config.json").exists() and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(r=4)], ids=["all", "adapter"])
def test_a_checkpoint_becomes_the_very_files_of_the_final_model(policy, tmp_path, lora):
    trainer = build_trainer(
        policy,
        tmp_path / "checkpoints",
        MadeUp(),
        dtype="bfloat16",
        lora=lora,
        learning_rate=0.1,
        max_grad_norm=1.0,
    )
    trainer.train_from(None)
    trainer.save_now()
    trainer.save_policy(tmp_path)
    config = trainer._config
    config.name = "e"
    config.env["e"] = EnvConfig("c", "a", data=DataConfig("jsonl", train_file="t", validation_file="v"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    checkpoint = tmp_path / "checkpoints" / "checkpoint-1"
    made = materialize(tmp_path, checkpoint, tmp_path / "made")
    expected = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    assert made == tmp_path / "made" and {p.name: p.read_bytes() for p in made.iterdir()} == expected
    before = load_file(policy / "model.safetensors")
    after = load_file(made / "model.safetensors")
    assert any(not torch.equal(after[name], before[name].bfloat16()) for name in before), "it has learned"
    (tmp_path / "result.json").write_text('{"step": 1, "stopped": false}')
    assert materialize(tmp_path, checkpoint, tmp_path / "again") == tmp_path / "model"
    (tmp_path / "result.json").unlink()
    if lora.r:
        write_adapter(tmp_path, checkpoint, tmp_path / "apart")
        ours, theirs = (
            load_file(d / "adapter_model.safetensors") for d in (tmp_path / "apart", tmp_path / "adapter")
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_that_goes_on_from_its_last_checkpoint_trains_no_step_more(build, monkeypatch):
    ran = []
    monkeypatch.setattr("trl.GRPOTrainer._run_epoch", lambda self, *args, **kwargs: ran.append(args))
    trainer = build()
    trainer.state.max_steps = 3
    for step in (2, 3):
        trainer.state.global_step = step
        trainer._run_epoch("epoch")
    assert ran == [("epoch",)]


def test_training_begins_at_the_checkpoint_and_its_clock_anew(build, monkeypatch):
    calls = []
    monkeypatch.setattr("trl.GRPOTrainer.train", lambda self, **options: calls.append(options))
    trainer = build()
    trainer._seconds["sync"] = 5.0
    trainer.train_from(None)
    assert trainer._seconds["sync"] == 0.0
    assert calls == [{"resume_from_checkpoint": None}]


@pytest.mark.parametrize("training", [True, False])
def test_a_comparison_with_the_engine_has_no_dropout_and_leaves_the_model_as_it_was(training):
    model = nn.Sequential(nn.Dropout(0.5)).train(training)
    with without_dropout(model):
        assert not model.training and not model[0].training
    assert model.training == model[0].training == training
    with pytest.raises(KeyError), without_dropout(model):
        raise KeyError
    assert model.training == training
