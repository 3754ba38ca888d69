"""A policy learns what needs independent draws in every turn, through the gateway and NeMo Gym."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from whole_run import TINY, Run

pytestmark = [pytest.mark.gym, pytest.mark.e2e]
STEPS = 30
ASKED = [{"role": "user", "content": "Choose."}]


def make_policy(directory: Path) -> None:
    """Says "a" with probability 0.6 and "b" with 0.4, in whatever turn; what comes before tells it little."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    [a], [b] = (tokenizer.encode(text, add_special_tokens=False) for text in "ab")
    attention, head = model.model.layers[0].self_attn, model.lm_head.weight
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(1.0, 1.0)  # a constant, by which the head prefers two tokens
        head.fill_(-0.3)
        head[[a, b]] = 0.3
        for projection in (attention.v_proj, attention.o_proj):
            projection.weight.normal_(0.0, 0.2)  # enough of the turns before to learn from
        state = model.model(prompt["input_ids"]).last_hidden_state[0, -1]
        head[b] -= 0.4 * state / state.dot(state)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def test_a_policy_learns_to_say_something_else_in_its_second_turn(started, folder: Path, gym_python: Path):
    make_policy(folder / "two_choices")
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"responses_create_params": {"input": ASKED}}) + "\n")
    data = f"env.two_turns.data.train_file='{rows}'", f"env.two_turns.data.validation_file='{rows}'"
    run: Run = started(
        "two_turns",
        "env=[two_turns]",
        *data,
        f"model.path='{folder / 'two_choices'}'",
        "dataset.train_size=64",
        f"trainer.max_steps={STEPS}",
        "trainer.learning_rate=1e-2",
        "trainer.lr_scheduler_type=constant",
        "trainer.warmup_steps=0",
        "trainer.per_device_train_batch_size=32",
        "trainer.gradient_accumulation_steps=2",
        "trainer.num_generations=16",
        "trainer.save_steps=1000",
        "rollout.drift_every=1",
        "evaluation.before=false",
        "evaluation.after=false",
        "evaluation.every_steps=0",
        own=Path(__file__).parent / "two_turns",
    )
    assert run.ended() == 0, run.said
    entries = [entry for entry in run.metrics() if "loss" in entry]
    rewards = [entry["two_turns/reward"] for entry in entries]
    # 2 * 0.6 * 0.4 by independent draws; one seed for both turns gives the same choice twice, and 0.
    assert 0.2 < rewards[0] < 0.7, rewards
    assert fmean(rewards[-4:]) > 0.85, rewards
    seen, expected = (sum(entry[f"repeats/{kind}"] for entry in entries) for kind in ("seen", "expected"))
    assert abs(seen - expected) < 4 * expected**0.5, "as many as chance alone gives"
