"""The objective of an optimizer step is TRL's, however its rows are grouped in micro-batches."""

from __future__ import annotations

import pytest
import torch
from small_trainer import (
    MadeUp,
    Servers,
    build_reference,
    build_trainer,
    gradient_of,
    logprobs_of,
    save_policy,
)

from gymexp.training import padding

WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("small"))


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.mark.grid
@pytest.mark.parametrize(
    "changes",
    [
        *({"loss_type": kind} for kind in ("grpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")),
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "grpo", "num_iterations": 2},
        {"loss_type": "grpo", "beta": 0.1},
        {"loss_type": "dapo", "scale_rewards": "none", "epsilon_high": 0.28},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_micro_batches_of_like_length_have_the_gradient_of_the_whole_batch(policy, tmp_path, changes):
    ours = gradient_of(build_trainer(policy, tmp_path, MadeUp(), correction="none", **changes))
    reference = gradient_of(build_reference(policy, tmp_path, MadeUp(), **(changes | WHOLE)))
    assert reference.norm() > 1e-3
    assert distance(ours, reference) < 1e-5


@pytest.mark.grid
@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "bnpo"},
        {"loss_type": "grpo", "entropy_coef": 0.1},
        {"loss_type": "grpo", "top_entropy_quantile": 0.5},
        {"loss_type": "dapo", "use_adaptive_entropy": True, "entropy_coef": 0.1},
    ],
    ids=lambda changes: " ".join(map(str, changes)),
)
def test_what_is_a_mean_over_a_micro_batch_is_over_trls_own(policy, tmp_path, changes):
    ours = gradient_of(build_trainer(policy, tmp_path, MadeUp(), correction="none", **changes))
    reference = gradient_of(build_reference(policy, tmp_path, MadeUp(), **changes))
    assert distance(ours, reference) < 1e-5


def region_clipped(trainer) -> float:
    gradient_of(trainer)
    [value] = {
        e["clip_ratio/region_mean"] for e in trainer.state.log_history if "clip_ratio/region_mean" in e
    }
    return value


def gspo(policy, tmp_path):
    changes = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
    trainer = build_trainer(policy, tmp_path, MadeUp(own_logprobs=True), dtype="bfloat16", **changes)
    trainer.sample_with_servers(Servers(), version=0)  # old log-probabilities come from a pass of their own
    return trainer


def test_no_rollout_is_clipped_by_a_policy_that_has_not_moved(policy, tmp_path, monkeypatch):
    assert region_clipped(gspo(policy, tmp_path)) == 0
    monkeypatch.setattr("gymexp.training.old_logprobs.rescored", lambda batch, score, model: batch)
    assert region_clipped(gspo(policy, tmp_path)) > 0, "as it was: by bfloat16's rounding alone"


def test_old_log_probabilities_stay_those_of_the_policy_that_sampled(policy, tmp_path):
    rollouts = MadeUp(own_logprobs=True)
    changes = {"correction": "decoupled", "importance_sampling_level": "sequence"}
    trainer = build_trainer(policy, tmp_path, rollouts, **changes)
    trainer.sample_with_servers(Servers(), version=0)
    gradient_of(trainer)
    mine = {tuple(row["completion_ids"]): logprobs_of(trainer, row) for row in rollouts.rows}
    seen = 0
    for batch in trainer._buffered_inputs:
        masks = batch["completion_mask"].bool()
        for ids, old, mask in zip(batch["completion_ids"], batch["old_per_token_logps"], masks, strict=True):
            assert old[mask].tolist() == pytest.approx(mine[tuple(ids[mask].tolist())], abs=1e-4)
            seen += 1
    assert seen == 8


def test_the_effective_sample_is_kishs_of_what_is_trained_on(policy, tmp_path):
    rollouts = MadeUp(own_logprobs=True, noise=0.5)
    changes = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 2.0}
    trainer = build_trainer(policy, tmp_path, rollouts, **changes)
    trainer.sample_with_servers(Servers(), version=0)
    gradient_of(trainer)
    weights = []
    for row in rollouts.rows:
        own = logprobs_of(trainer, row)
        for ours, theirs, trained in zip(own, row["logprobs"], row["env_mask"], strict=True):
            if trained:
                weights.append(min(2.0, torch.tensor(ours - theirs).exp().item()))
    expected = sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)
    [logged] = [e for e in trainer.state.log_history if "sampling/effective_sample_size" in e]
    assert logged["sampling/effective_sample_size"] == pytest.approx(expected, rel=1e-4)
    assert expected < 0.95


def test_weights_of_whole_rollouts_count_those_that_are_trained_on():
    weights, mask = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([[1, 0], [0, 1], [0, 0]])
    assert [float(x) for x in padding.effective_sample(weights, mask)] == [4.0, 10.0, 2.0]
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert [float(x) for x in padding.effective_sample(weights, mask)] == [5.0, 17.0, 2.0]


def test_trl_counts_a_rollout_as_cut_by_the_gateways_end_tokens(policy, tmp_path):
    """A base model's tokenizer ends with another token than its chat template ends a turn with."""
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    save_policy(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    end_of_turn, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(tokenizer.pad_token)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(7)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(other)
    tokenizer.save_pretrained(base)

    class Ended(MadeUp):
        def __call__(self, prompts, trainer):
            rows = super().__call__(prompts, trainer)
            for ids in rows["completion_ids"][:6]:
                ids[-1] = end_of_turn
            return rows

    trainer = build_trainer(base, tmp_path, Ended())
    gradient_of(trainer)
    assert {end_of_turn, 7} <= set(trainer.eos_token_ids)
    [logged] = [e for e in trainer.state.log_history if "completions/clipped_ratio" in e]
    assert logged["completions/clipped_ratio"] == 0.25
