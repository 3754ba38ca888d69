"""The loss with each `rollout.correction`, beside TRL's own path and beside formulas written out here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_trainer import (
    Gradients,
    MadeUp,
    build_reference,
    build_trainer,
    gradient_of,
    logprobs_of,
    save_policy,
)
from trl import GRPOTrainer

from gymexp.config.schema import LoraConfig
from gymexp.errors import DriftError
from gymexp.rollout.outcome import Completed, Failed, Rollout, Task, Turn

LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {},
    "dapo": {"epsilon_high": 0.28},
    "cispo": {"epsilon_high": 1.5},
    "sapo": {},
    "vespo": {},
    "luspo": {"importance_sampling_level": "sequence"},
}
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("small"))


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


def logged(trainer: GRPOTrainer, name: str) -> float:
    [value] = [entry[name] for entry in trainer.state.log_history if name in entry]
    return value


@pytest.mark.grid
@pytest.mark.parametrize(
    ("loss_type", "lora"), [*((kind, None) for kind in LOSSES), ("grpo", LoraConfig(r=4))]
)
def test_with_an_exact_engine_the_gradient_is_trls_with_its_recomputed_log_probabilities(
    policy, tmp_path, loss_type, lora
):
    changes = LOSSES[loss_type] | {"loss_type": loss_type, "lora": lora}
    gradients = {}
    for correction in ("behavior", "decoupled", "none"):
        torch.manual_seed(0)  # the adapter's first weights
        exact = MadeUp(own_logprobs=True)
        trainer = build_trainer(policy, tmp_path, exact, correction=correction, **changes)
        gradients[correction] = gradient_of(trainer)
        assert logged(trainer, "sampling/ratio_mean") == pytest.approx(1, abs=1e-5)
        assert logged(trainer, "sampling/ratio_max") == pytest.approx(1, abs=1e-4)
        assert logged(trainer, "sampling/effective_sample_size") == pytest.approx(1, abs=1e-5)
    assert gradients["decoupled"].norm() > 1e-3
    assert distance(gradients["behavior"], gradients["decoupled"]) < 1e-6
    assert distance(gradients["none"], gradients["decoupled"]) < 1e-5


def loss_by_hand(kind: str, options: Any, ratio: torch.Tensor, logp: torch.Tensor, advantage: float) -> Any:
    """Of one rollout: (T) terms of its trained tokens, to be added up or averaged as the loss says."""
    if kind == "cispo":
        return -ratio.detach().clamp(max=options.epsilon_high) * advantage * logp
    if kind == "sapo":
        steep = options.sapo_temperature_pos if advantage > 0 else options.sapo_temperature_neg
        return -torch.sigmoid(steep * (ratio - 1)) * 4 / steep * advantage
    if kind == "vespo":
        power, rate = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        weight = ratio.detach().log().sum().exp()
        return -(rate + power * weight.log() - rate * weight).exp() * advantage * logp
    if kind == "luspo":
        ratio = ratio.log().mean().exp().expand_as(ratio)
    upper = options.epsilon if options.epsilon_high is None else options.epsilon_high
    cut = ratio.clamp(1 - options.epsilon, 1 + upper)
    return -torch.minimum(ratio * advantage, cut * advantage)


def gradient_by_hand(trainer: Any, rollouts: MadeUp) -> torch.Tensor:
    """The gradient of the whole batch of two groups of four."""
    args, kind = trainer.args, trainer.args.loss_type
    rewards = torch.tensor([row["reward"] for row in rollouts.rows]).view(-1, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    terms = []
    for row, advantage in zip(rollouts.rows, advantages.tolist(), strict=True):
        ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
        first, own = len(row["prompt_ids"]), torch.tensor(row["env_mask"]).bool()
        logits = trainer.model(input_ids=ids).logits[0, first - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, ids[0, first:, None])[:, 0][own]
        ratio = (logp - torch.tensor(row["logprobs"])[own]).exp()
        terms.append(loss_by_hand(kind, args, ratio, logp, advantage))
    tokens = sum(term.numel() for term in terms)
    if kind in ("grpo", "sapo"):
        loss = torch.stack([term.mean() for term in terms]).mean()
    elif kind == "luspo":
        loss = torch.stack([term.sum() for term in terms]).mean()
    else:
        of = len(terms) * args.max_completion_length if kind == "dr_grpo" else tokens
        loss = torch.cat(terms).sum() / of
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.grid
@pytest.mark.parametrize("loss_type", LOSSES)
def test_with_another_engine_the_ratio_is_to_its_probabilities_and_clipped_as_by_hand(
    policy, tmp_path, loss_type
):
    rollouts = MadeUp(own_logprobs=True, noise=0.4)
    changes = LOSSES[loss_type] | {"loss_type": loss_type} | WHOLE
    trainer = build_trainer(policy, tmp_path, rollouts, correction="behavior", **changes)
    gradient = gradient_of(trainer)
    assert distance(gradient, gradient_by_hand(trainer, rollouts)) < 1e-5
    without = gradient_of(build_trainer(policy, tmp_path, MadeUp(True, 0.4), correction="none", **changes))
    assert distance(gradient, without) > 1e-2


def test_the_metrics_of_the_training_pass_are_those_of_its_tokens(policy, tmp_path):
    rollouts = MadeUp(own_logprobs=True, noise=0.4)
    trainer = build_trainer(policy, tmp_path, rollouts, correction="behavior")
    gradient_of(trainer)
    rewards = torch.tensor([row["reward"] for row in rollouts.rows]).view(-1, 4)
    positive = (rewards > rewards.mean(1, keepdim=True)).flatten().tolist()
    ratios, clipped = [], 0
    for row, good in zip(rollouts.rows, positive, strict=True):
        for own, engine, flag in zip(
            logprobs_of(trainer, row), row["logprobs"], row["env_mask"], strict=True
        ):
            if flag:
                ratios.append(math.exp(own - engine))
                clipped += ratios[-1] > 1.2 if good else ratios[-1] < 0.8
    size = sum(ratios) ** 2 / sum(r * r for r in ratios) / len(ratios)
    assert 0 < clipped < len(ratios) and size < 0.95
    assert logged(trainer, "sampling/ratio_mean") == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert logged(trainer, "sampling/ratio_max") == pytest.approx(max(ratios), rel=1e-4)
    assert logged(trainer, "sampling/clipped") == pytest.approx(clipped / len(ratios))
    assert logged(trainer, "sampling/effective_sample_size") == pytest.approx(size, rel=1e-5)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("changes", "cut"),
    [
        ({"correction": "none"}, None),
        ({"correction": "behavior", "loss_type": "sapo"}, None),
        ({"correction": "behavior", "loss_type": "cispo", "epsilon_high": 0.01}, "positive"),
        ({"correction": "behavior", "loss_type": "cispo", "epsilon_high": 100.0}, "none"),
        ({"correction": "behavior", "importance_sampling_level": "sequence", "epsilon": 0.0}, "rollouts"),
        ({"vllm_importance_sampling_clip_max": 1e-6}, "all"),
        (
            {"vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 1e-30},
            "all",
        ),
        ({"vllm_importance_sampling_clip_max": 1e6}, "none"),
    ],
    ids=str,
)
def test_what_is_cut_off_is_what_the_correction_cuts_off(policy, tmp_path, changes, cut):
    rollouts = MadeUp(own_logprobs=True, noise=0.4)
    trainer = build_trainer(policy, tmp_path, rollouts, **changes)
    gradient_of(trainer)
    entry = next(e for e in trainer.state.log_history if "sampling/ratio_mean" in e)
    if cut is None:
        assert "sampling/clipped" not in entry
        return
    rewards = torch.tensor([row["reward"] for row in rollouts.rows]).view(-1, 4)
    positive = (rewards > rewards.mean(1, keepdim=True)).flatten().tolist()
    trained = [sum(row["env_mask"]) for row in rollouts.rows]
    of_positive = sum(n for n, good in zip(trained, positive, strict=True) if good) / sum(trained)
    if (
        cut == "rollouts"
    ):  # with no room at all, every rollout whose mean ratio lies on its advantage's far side
        assert 0 < entry["sampling/clipped"] * 8 == pytest.approx(round(entry["sampling/clipped"] * 8))
    else:
        assert entry["sampling/clipped"] == pytest.approx({"all": 1, "none": 0, "positive": of_positive}[cut])


@pytest.mark.grid
@pytest.mark.parametrize("steps_per_generation", [4, 8])
@pytest.mark.parametrize("correction", ["behavior", "none", "decoupled"])
def test_behavior_makes_no_pass_for_old_log_probabilities_also_with_several_updates_a_batch(
    policy, tmp_path, correction, steps_per_generation, monkeypatch
):
    passes = []
    score = GRPOTrainer._get_per_token_logps_and_entropies

    def counted(self, *args, **more):
        passes.append(torch.is_grad_enabled())
        return score(self, *args, **more)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
    changes = {"num_iterations": 2, "max_steps": 4, "steps_per_generation": steps_per_generation}
    trainer = build_trainer(policy, tmp_path, MadeUp(own_logprobs=True), correction=correction, **changes)
    trainer.train_from(None)
    assert passes.count(True) == 4 * 4
    assert (passes.count(False) == 0) == (correction == "behavior")


def test_with_several_updates_a_batch_the_ratio_stays_that_to_the_engine(policy, tmp_path):
    """Plain PPO: what sampled is the old policy in every update. TRL's path comes to the same."""
    changes = {"num_iterations": 3, "max_steps": 3, "learning_rate": 0.05, "beta": 0.1}
    gradients = []
    for build in (build_trainer, build_reference):
        trainer = build(policy, tmp_path, MadeUp(own_logprobs=True), **changes)
        last = Gradients()
        trainer.add_callback(last)
        trainer.train()
        gradients.append(last.flat)
    assert distance(*gradients) < 1e-4


class Sampled(MadeUp):
    """Rollouts that are checked as real ones are. shift: of the engine's log-probabilities. version: of the
    weights that sampled them; None: the engine does not say."""

    def __init__(self, shift: float = 0.0, version: int | None = None) -> None:
        super().__init__(own_logprobs=True)
        self.shift, self.version = shift, version

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        rows = super().__call__(prompts, trainer)
        outcomes: list[Any] = [Failed(Task("t", "e", "a", {}), "killed", "")]
        rows["env_mask"] = [[0]] + [[1] * len(ids) for ids in rows["completion_ids"][1:]]
        rows["reward"][0], rows["completion_ids"][0], rows["logprobs"][0] = None, [5], [0.0]
        for index, (prompt, ids) in enumerate(zip(rows["prompt_ids"], rows["completion_ids"], strict=True)):
            if index:
                own = logprobs_of(trainer, {"prompt_ids": prompt, "completion_ids": ids})
                rows["logprobs"][index] = [value + self.shift for value in own]
                turn = Turn(prompt, ids, rows["logprobs"][index])
                task = Task(f"t{index // 4}", "e", "a", {})
                outcomes.append(Completed(Rollout(task, [turn], 1.0, [], weights_version=self.version)))
        trainer.check_samples(outcomes)
        return rows


def test_the_training_pass_shows_the_drift_of_every_step(policy, tmp_path):
    trainer = build_trainer(policy, tmp_path, Sampled(shift=-5e-4), max_steps=3, learning_rate=0.01)
    trainer.train_from(None)
    drift = [entry["drift"] for entry in trainer.state.log_history if "drift" in entry]
    assert drift == [pytest.approx(5e-4, rel=1e-2)] * 3
    assert [e["e/drift"] for e in trainer.state.log_history if "e/drift" in e] == drift


@pytest.mark.grid
@pytest.mark.parametrize("correction", ["behavior", "decoupled", "none"])
def test_drift_ends_the_run_before_the_update(policy, tmp_path, correction):
    changes = {"correction": correction, "learning_rate": 0.1}
    trainer = build_trainer(policy, tmp_path, Sampled(shift=-0.01), **changes)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(
        DriftError, match=r"env\.e differ .* by 0\.0100 nats .* rollout\.max_drift allows 0\.001"
    ):
        trainer.train_from(None)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_rollouts_of_older_weights_and_later_updates_of_a_batch_are_not_compared(policy, tmp_path):
    older = build_trainer(policy, tmp_path, Sampled(shift=-0.01, version=-1))
    older.train_from(None)
    assert not any("drift" in entry for entry in older.state.log_history)
    assert logged(older, "sampling/ratio_mean") == pytest.approx(math.exp(0.01), rel=1e-4)
    twice = build_trainer(policy, tmp_path, Sampled(), num_iterations=2, max_steps=2, learning_rate=0.1)
    twice.train_from(None)
    assert ["drift" in entry for entry in twice.state.log_history if "loss" in entry] == [True, False]
    largest = [e["sampling/ratio_max"] for e in twice.state.log_history if "loss" in e]
    assert largest[0] == pytest.approx(1, abs=1e-4) and largest[1] > 1.01


class WithoutAdapter(Sampled):
    """Rollouts of an engine that ignores the policy's adapter."""

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        with trainer.model.disable_adapter():
            return super().__call__(prompts, trainer)


def test_an_engine_that_ignores_the_adapter_ends_the_run_once_the_adapter_is_not_zero(policy, tmp_path):
    changes = {"lora": LoraConfig(r=4), "max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2}
    right = build_trainer(policy, tmp_path / "right", Sampled(), **changes)
    right.train_from(None)
    assert [e["drift"] for e in right.state.log_history if "drift" in e] == [pytest.approx(0, abs=1e-5)] * 3
    wrong = build_trainer(policy, tmp_path / "wrong", WithoutAdapter(), **changes)
    with pytest.raises(DriftError, match=r"env\.e differ .* step 1\); rollout\.max_drift allows 0\.001"):
        wrong.train_from(None)


def test_with_dropout_the_drift_is_that_of_a_pass_without_any(policy, tmp_path):
    lora = LoraConfig(r=4, lora_dropout=0.5)
    trainer = build_trainer(policy, tmp_path, Sampled(shift=-5e-4), lora=lora, max_steps=1)
    with torch.no_grad():  # an adapter that has learned something
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    trainer.train_from(None)
    assert logged(trainer, "drift") == pytest.approx(5e-4, rel=1e-2)
    assert logged(trainer, "sampling/ratio_max") > 1.05


def test_another_ranks_numbers_count_and_its_drift_ends_the_run_here_too(policy, tmp_path, monkeypatch):
    trainer = build_trainer(policy, tmp_path, Sampled())
    accelerator = type(trainer.accelerator)
    gather = accelerator.gather

    def with_another(self: Any, own: torch.Tensor) -> torch.Tensor:
        if own.dim() < 2 or own.dtype != torch.float64:
            return gather(self, own)
        other = own.clone()
        other[0, 2:6] = torch.tensor([30.0, 90.0, 30.0, 0.0])  # 30 tokens of ratio 3
        other[0, 7] = 3.0
        other[0, 8:] = torch.tensor([30.0, 30 * math.log(3), -30.0, -30.0])
        return torch.cat([own, other])

    monkeypatch.setattr(accelerator, "gather", with_another)
    with pytest.raises(DriftError, match=r"env\.e differ"):
        trainer.train_from(None)
    metrics = trainer._metrics["train"]
    assert metrics["sampling/ratio_max"] == [3.0]
    tokens = sum(len(row["completion_ids"]) for row in trainer._rollouts.rows[1:])
    assert metrics["sampling/ratio_mean"] == [pytest.approx((tokens + 90) / (tokens + 30), rel=1e-4)]
    assert metrics["e/drift"] == [pytest.approx(30 * math.log(3) / (tokens + 30), rel=1e-4)]
