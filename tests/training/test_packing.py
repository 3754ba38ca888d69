"""Packed rows have the log-probabilities, the loss and the gradients of padded ones."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given, settings
from hypothesis import strategies as st
from padded_rows import distance, padded
from small_trainer import MadeUp, build_trainer, gradient_of, logprobs_of, save_policy
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from gymexp.config.schema import LoraConfig, ModelConfig, RunConfig
from gymexp.errors import ConfigError
from gymexp.training import packing, packing_rules
from gymexp.training.packing import build_pack, group_by_prompt

LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {},
    "dapo": {"beta": 0.1},
    "cispo": {"epsilon_high": 1.5},
    "sapo": {"entropy_coef": 0.1},
    "vespo": {},
    "luspo": {"importance_sampling_level": "sequence"},
}
PACKINGS = ("varlen", "tree")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("small"))


class Groups(MadeUp):
    """Rows of two prompts, one of them of a single token; rows of a single masked token, as a failed rollout
    leaves them; rows that are masked as a whole."""

    is_playing = False

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        self.is_playing = True
        rows = super().__call__(prompts, trainer)
        for index in range(len(prompts)):
            rows["prompt_ids"][index] = [9] if index >= 4 else [5, 6, 7, 8, 9, 10, 11]
        rows["prompt_ids"][2], rows["completion_ids"][2] = [3], [3]
        rows["env_mask"][2] = [0]
        rows["env_mask"][4] = [0] * len(rows["env_mask"][4])
        draw = random.Random(0)
        for index, (prompt, ids) in enumerate(zip(rows["prompt_ids"], rows["completion_ids"], strict=True)):
            own = logprobs_of(trainer, {"prompt_ids": prompt, "completion_ids": ids})
            rows["logprobs"][index] = [value + 0.2 * draw.gauss(0, 1) for value in own]
        self.is_playing = False
        return rows


@pytest.mark.grid
@pytest.mark.parametrize("packs", PACKINGS)
@pytest.mark.parametrize(
    ("loss_type", "lora"), [*((kind, None) for kind in LOSSES), ("grpo", LoraConfig(r=4))]
)
def test_the_gradient_of_packed_rows_is_that_of_padded_ones(policy, tmp_path, loss_type, lora, packs):
    changes = LOSSES[loss_type] | {"loss_type": loss_type, "lora": lora}
    gradients, losses = [], []
    for kind in ("none", packs):
        torch.manual_seed(0)  # the adapter's first weights
        trainer = build_trainer(policy, tmp_path, Groups(), packing=kind, **changes)
        gradients.append(gradient_of(trainer))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert gradients[0].norm() > 1e-3
    assert distance(*gradients) < 1e-5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-5)


@pytest.mark.grid
@pytest.mark.parametrize("packs", PACKINGS)
@pytest.mark.parametrize("correction", ["behavior", "decoupled"])
def test_every_pass_is_packed_and_layers_that_are_computed_again_too(
    policy, tmp_path, packs, correction, monkeypatch
):
    """Gradient checkpointing, the pass for old log-probabilities, the reference, several updates a batch."""
    changes = {"correction": correction, "num_iterations": 2, "beta": 0.1, "max_steps": 4}
    changes |= {"gradient_checkpointing": True, "learning_rate": 0.01}
    weights, calls = {}, []
    attend, rollouts = packing.functional.scaled_dot_product_attention, Groups()
    for kind in ("none", packs):
        trainer = build_trainer(policy, tmp_path, rollouts, packing=kind, **changes)
        if kind == packs:

            def counted(query: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
                if not rollouts.is_playing:
                    calls.append(tuple(query.shape[:1]))
                return attend(query, *args, **more)

            monkeypatch.setattr(packing.functional, "scaled_dot_product_attention", counted)
        trainer.train_from(None)
        weights[kind] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert distance(weights[packs], weights["none"]) < 1e-5
    passes = 2 * 4 + (2 * 4 if correction == "decoupled" else 0)  # without gradients, of two batches
    assert calls == [(1,)] * (passes + 4 * 4 * 2), "each update's layer is computed twice"


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.4,
        max_position_embeddings=256,
        pad_token_id=0,
        **({"sliding_window": None} if kind == "mistral" else {}),
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    return model


def some_rows(seed: int) -> list[tuple[list[int], list[int]]]:
    draw = random.Random(seed)
    prompts = [[draw.randrange(1, 64) for _ in range(size)] for size in (1, 9, 20)]
    return [
        (draw.choice(prompts), [draw.randrange(1, 64) for _ in range(draw.randrange(1, 15))])
        for _ in range(7)
    ]


@pytest.mark.grid
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("kind", packing_rules.MODEL_TYPES)
def test_each_model_that_may_be_packed_gives_the_values_of_its_padded_pass(kind, shares):
    model = model_of(kind)
    ids, mask, width = padded(some_rows(1))
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-width] = -100
    weights, results = torch.randn(ids.size(0), width), []
    trained = mask[:, -width:].bool()
    for packed in (False, True):
        if packed:
            packing.prepare(model)
            logprobs, entropies = packing.score(model, ids, mask, width, shares)
        else:
            output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            logprobs, entropies = output.log_probs[:, -width:], output.entropy[:, -width:]
        model.zero_grad()
        (logprobs * weights)[trained].sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((logprobs[trained], entropies[trained], gradient))
    for plain, packed in zip(*results, strict=True):
        assert distance(packed, plain) < 1e-5
    again = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -width:]
    assert torch.allclose(again[trained], results[0][0], atol=1e-6), (
        "rows with padding are computed as before"
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_a_token_attends_to_its_own_rollout_up_to_itself_and_to_nothing_else(seed, shares):
    """Checked against the rows: a place sees the tokens of its rollout, in their order, up to itself."""
    rows = some_rows(seed)
    ids, mask, width = padded(rows)
    pack = build_pack(ids, mask, width, shares)
    tokens, places = pack.ids.tolist(), (pack.labels != -100).nonzero()[:, 0].tolist()
    total = sum(len(prompt) + len(completion) for prompt, completion in rows)
    groups = {tuple(prompt) for prompt, _ in rows}
    spared = sum(len(p) - 1 for p, _ in rows) - sum(len(p) - 1 for p in groups)
    assert len(tokens) == (total - spared if shares else total)
    assert len(places) == sum(len(completion) for _, completion in rows) == len(pack.rows)
    for place, row, column in zip(places, pack.rows.tolist(), pack.columns.tolist(), strict=True):
        prompt, completion = rows[row]
        seen = pack.segments.mask[place].nonzero()[:, 0].tolist()
        assert [tokens[at] for at in seen] == [*prompt, *completion[:column]]
        assert [pack.positions[at] for at in seen] == list(range(len(seen)))
        assert pack.labels[place] == completion[column]


def flash(query, key, value, of_queries, of_keys, max_q, max_k, *, scale, window_size):
    """FlashAttention's kernel for sequences of different lengths, as its documentation describes it: (tokens,
    heads, D); each sequence apart, and its causal mask aligned with the ends of queries and keys."""
    assert window_size == (-1, 0), "causal"
    assert all(x.is_contiguous() and x.dtype == torch.bfloat16 for x in (query, key, value))
    assert of_queries.dtype == of_keys.dtype == torch.int32
    assert query.shape[1:] == key.shape[1:] == value.shape[1:], "no grouped heads"
    assert (of_queries[-1], of_keys[-1]) == (query.size(0), key.size(0)) and key.size(0) == value.size(0)
    assert (max_q, max_k) == (of_queries.diff().max(), of_keys.diff().max())
    found = []
    for (a, b), (c, d) in zip(pairwise(of_queries.tolist()), pairwise(of_keys.tolist()), strict=True):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        one = (x.transpose(0, 1).float() for x in (query[a:b], key[c:d], value[c:d]))
        attend = torch.nn.functional.scaled_dot_product_attention
        found.append(attend(*one, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(found)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([1, 2, 4]), st.sampled_from([None, 0.3]))
def test_the_kernel_is_called_so_that_it_attends_as_the_mask_says(seed, shares, key_heads, scale):
    """On a GPU; tests/training/test_packing_gpu.py has the kernel itself."""
    segments = build_pack(*padded(some_rows(seed)), shares).segments
    torch.manual_seed(seed)
    total = segments.mask.size(0)
    query, key, value = (torch.randn(1, heads, total, 8) for heads in (4, key_heads, key_heads))
    given = [x.bfloat16() for x in (query, key, value)]
    plain, _ = packing._attend(
        None, *(x.float() for x in given), None, packed_segments=segments, scaling=scale
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.attention.varlen, "varlen_attn", flash)
        packed = packing._flash(query, key, value, segments, scale, torch.bfloat16)
    assert packed.shape == plain.shape == (1, total, 4, 8)
    assert torch.allclose(packed, plain, atol=1e-5)


def test_rows_of_a_prompt_follow_each_other_with_all_that_belongs_to_them():
    batches = [
        {
            "prompt_ids": torch.tensor([[0, 7], [0, 8]]),
            "prompt_mask": torch.tensor([[0, 1]] * 2),
            "x": torch.tensor([0, 1]),
        },
        {
            "prompt_ids": torch.tensor([[0, 8], [0, 7]]),
            "prompt_mask": torch.tensor([[0, 1]] * 2),
            "x": torch.tensor([2, 3]),
        },
    ]
    assert [batch["x"].tolist() for batch in group_by_prompt(batches)] == [[0, 3], [1, 2]]


@pytest.mark.parametrize(
    ("gpus", "changes", "chosen", "why"),
    [
        ([(9, 0)], {}, "tree", ""),
        ([(8, 0), (9, 0)], {}, "tree", ""),
        ([], {}, "none", ""),
        ([(7, 5), (9, 0)], {}, "none", "compute capability 8.0, and one here has 7.5"),
        ([(10, 0)], {}, "none", "GPUs as new"),
        ([(9, 0)], {"dtype": "float32"}, "none", "no float32"),
        ([(9, 0)], {"torch_compile": True}, "tree", ""),
        ([(9, 0)], {"attn_implementation": "eager"}, "none", "model.attn_implementation must be sdpa"),
        ([(9, 0)], {"model_type": "gpt_oss"}, "none", "not gpt_oss"),
    ],
    ids=str,
)
def test_auto_packs_where_it_was_compared_with_padding(tmp_path, monkeypatch, gpus, changes, chosen, why):
    settings = dict(changes)
    of_model = {"model_type": settings.pop("model_type", "qwen2")}
    (tmp_path / "config.json").write_text(json.dumps(QWEN | of_model))
    monkeypatch.setattr(packing_rules, "compute_capabilities", lambda: gpus)
    monkeypatch.setattr(packing_rules, "visible_gpus", lambda: ["0"] * len(gpus))
    trainer = {"torch_compile": settings.pop("torch_compile", False)}
    config = RunConfig(model=ModelConfig("m", str(tmp_path), **settings), trainer=trainer)
    found, said = packing_rules.chosen(config, tmp_path, trains_on_gpu=bool(gpus))
    assert found == chosen
    assert why in said and bool(why) == bool(said)


QWEN = {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False, "attention_dropout": 0.0}


@pytest.mark.grid
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"layer_types": ["full_attention"] * 2}, None),
        ({"use_sliding_window": True}, "a sliding window of 4096 tokens"),
        ({"model_type": "mistral", "use_sliding_window": True}, "a sliding window of 4096 tokens"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"model_type": "gpt_oss"}, "not gpt_oss"),
        ({"attention_dropout": 0.1}, "attention_dropout of 0.1"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_packed_is_refused_by_its_config(tmp_path, changes, why):
    (tmp_path / "config.json").write_text(json.dumps(QWEN | changes))
    for kind in ("none", "tree"):
        model = ModelConfig("m", str(tmp_path), packing=kind)
        if why is None or kind == "none":
            packing_rules.check(model, tmp_path)
        else:
            with pytest.raises(ConfigError, match=f"model.packing must be none .*{why}.*, got 'tree'"):
                packing_rules.check(model, tmp_path)
