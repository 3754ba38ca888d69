"""Conversations of several turns with a small policy, whose draws are looked at."""

from __future__ import annotations

from typing import Any

import torch
from chat_tokenizers import build_tokenizer
from scripted_engine import chat
from transformers import Qwen3Config, Qwen3ForCausalLM

TOKENIZER = build_tokenizer("qwen3")


def build_model() -> Qwen3ForCausalLM:
    """Its distribution depends little on what came before: draws with a shared seed repeat each other."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(1.0, 0.3)
        model.lm_head.weight.normal_(0.0, 0.35)
    return model


async def converse(http: Any, index: int, seed: int, play: str, turns: int = 3) -> list[dict]:
    """The sampled messages of one conversation with the policy."""
    messages = [{"role": "user", "content": f"Puzzle {index % 7}."}]
    sampled = []
    for _ in range(turns):
        status, answer = await chat(http, messages, seed=seed, play=play, max_tokens=8)
        assert status == 200, answer
        sampled.append(answer["choices"][0]["message"])
        messages = [*messages, sampled[-1], {"role": "user", "content": "And now?"}]
    return sampled
