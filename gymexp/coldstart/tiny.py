"""The tiny policy: a Qwen3 of a few million parameters, with a tokenizer made for it, that trains on two CPU
cores.

What costs time in a small model is the number of tokens. Two things keep it low. Lines that the environments
repeat in every prompt (instructions, tool schemas, common tool answers) are one token each, so that 15 KB of
schemas become 27 tokens. Everything else is byte-level BPE whose pieces take one following space or newline
with them, so that a word is the same token after a quote as after a space (what is copied from a mail into a
call stays the same tokens), a sudoku cell is the same token wherever it stands, and text after a line break
never depends on what came before it.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3ForCausalLM

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "tiny"

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# In Qwen3 these are tokens of their own but not special: they survive decoding with skip_special_tokens=True.
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

# How text is cut before BPE merges within the pieces. In order: the constant head of an eight-digit id, a
# year, other digits one by one, a word, a mail domain, escaped newlines in JSON, punctuation (`": "` is one
# piece), whitespace.
PIECES = "|".join(
    (
        r"0{5}(?=[0-9]{3}(?![0-9]))",
        r"20[0-9]{2}-",
        r"[0-9][ \n]?",
        r"[\p{L}\p{M}_]+[ \n]?",
        r"@[A-Za-z]+(?:\.[A-Za-z]+)*",
        r"(?:\\+n)+",
        r"\\",
        r"[^\p{L}\p{M}0-9_\s\\]+(?: [^\p{L}\p{M}0-9_\s\\]+)*[ \n]?",
        r"\s",
    )
)

# Qwen3's calls, as transformers' `parse_response` wants them described.
RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": f"{START}assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}

# Merged whatever the texts are: a cell of a puzzle with what follows it.
CELLS = " ".join("0123456789_") + " \n" + "\n".join("0123456789_") + "\n"

# What every call has in common; not lines, so not found by `boilerplate`.
CALL_PHRASES = ('{"name": "', '", "arguments": {"')


def chat_template() -> str:
    """The tiny policy's chat template, as Jinja's source."""
    return (ASSETS / "chat_template.jinja").read_text(encoding="utf-8")


def boilerplate(
    texts: Sequence[str], min_share: float = 0.01, min_count: int = 8, min_chars: int = 16
) -> list[str]:
    """Lines (with their newline) that stand in many of the texts, longest first.

    texts: rendered conversations. What assistants and tools said is left out: that is what the policy writes
    and copies, piece by piece. ASCII only, since the byte-level decoder reads other characters of an added
    token as bytes.
    """
    said = re.compile(
        rf"{re.escape(START)}assistant\n.*?{re.escape(END)}|<tool_response>.*?</tool_response>", re.DOTALL
    )
    tags = re.compile("|".join(map(re.escape, (PAD, START, END, *TAGS))))
    counts: Counter[str] = Counter()
    for text in texts:
        # Cut at the tags: an added token must not swallow one.
        counts.update(
            {line for part in tags.split(said.sub("", text)) for line in part.splitlines(keepends=True)}
        )
    least = max(min_count, min_share * len(texts))
    found = [line for line, n in counts.items() if n >= least and len(line) >= min_chars and line.isascii()]
    return sorted(found, key=lambda line: (-len(line), line))


def build_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """The tiny policy's tokenizer, its merges and boilerplate learned from rendered conversations (see
    `render`).

    vocab_size: upper limit, special tokens and boilerplate included. Any text is encoded and decoded exactly.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = list(texts)
    phrases = boilerplate(texts)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = [AddedToken(t, special=True, normalized=False) for t in (PAD, START, END)]
    tokens += [AddedToken(t, special=False, normalized=False) for t in TAGS]
    added = [AddedToken(t, special=False, normalized=False) for t in (*CALL_PHRASES, *phrases)]
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size - len(added), len(alphabet) + len(tokens)),
        min_frequency=3,
        initial_alphabet=sorted(alphabet),
        special_tokens=tokens,
        show_progress=False,
    )
    # The boilerplate is a token already: merges are for the rest.
    cut = re.compile("|".join(map(re.escape, (*phrases, PAD, START, END, *TAGS))))
    learned = (part for text in texts for part in cut.split(text) if part)
    core.train_from_iterator(chain(repeat(CELLS, 1000), learned), trainer)
    core.add_tokens(added)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = chat_template()
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def render(messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
    """A conversation as the tiny policy's chat template writes it; needs no tokenizer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], tools=tools, chat_template=chat_template())
    return rendered[0]


@dataclass
class Shape:
    """Qwen3Config's own fields; the defaults are the tiny policy's."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32


def build_model(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, shape: Shape | None = None
) -> Qwen3ForCausalLM:
    """The tiny policy untrained, in float32, or a larger one of its kind."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    pad: Any = tokenizer.pad_token_id
    end: Any = tokenizer.eos_token_id
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=pad,
        eos_token_id=end,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        **dataclasses.asdict(shape or Shape()),
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=end,
        pad_token_id=pad,
        do_sample=True,
        temperature=1.0,
    )
    return model
