"""Rollouts of several turns, made up for tests of their tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from chat_tokenizers import TEMPLATES, build_tokenizer
from hypothesis import strategies as st

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
        },
    }
]


TRL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"


TRL_TEMPLATES = sorted(path for path in TRL.glob("*.jinja") if "training" not in path.stem)


END = {"plain": "<|im_end|>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>"}


words = st.sampled_from(
    [
        "grid",
        " 1 2",
        "naïve",
        "東京",
        "🙂",
        "\n",
        "  ",
        "<|im_end|>",
        "<|eot_id|>",
        "<tool_call>",
        '{"a": 1}',
        "\t",
        "é",
    ]
)


# Text of a user or a tool, some of it looking like special tokens, some of it nothing but space.
texts = st.lists(words | st.text(max_size=6), max_size=6).map("".join).filter(lambda t: "\x00" not in t)


def sampled(prompt_ids, generation_ids, **fields):
    ids = {"prompt_token_ids": prompt_ids, "generation_token_ids": generation_ids, "generation_log_probs": []}
    return {"role": "assistant", "content": "whatever the parser made of it", **ids, **fields}


def tool_message(text, number):
    return {"role": "tool", "content": text, "tool_call_id": f"call_{number}"}


@st.composite
def rollouts(draw):
    """(template, tokenizer, first messages, tools, per turn (generation ids, ended, what came then))."""
    template = draw(st.sampled_from(sorted(TEMPLATES)))
    tokenizer = build_tokenizer(template, draw(st.booleans()))
    end_id = tokenizer.convert_tokens_to_ids(END[template])
    first = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    first.append({"role": "user", "content": draw(texts)})
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        ids = st.integers(0, len(tokenizer) - 1).filter(lambda i: i not in tokenizer.all_special_ids)
        ended = draw(st.booleans())
        generation = draw(st.lists(ids, min_size=0 if ended else 1, max_size=5)) + [end_id] * ended
        roles = draw(st.sampled_from([["tool"], ["tool", "tool", "tool"], ["user"], ["tool", "user"]]))
        turns.append((generation, ended, [(role, draw(texts)) for role in roles]))
    return template, tokenizer, first, draw(st.sampled_from([None, TOOLS])), turns
