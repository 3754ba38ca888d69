"""The tiny policy: a Qwen3 of a few million parameters with its own tokenizer, which trains on two CPU cores.

The time of a small model depends on the number of tokens. Two rules keep the number low:

* A line that the environments repeat in every prompt (instructions, tool schemas, common tool answers) is one
  token, so that 15 KB of schemas become 27 tokens.
* The rest is byte-level BPE whose pieces include one following space or newline. So a word is the same token
  after a quote as after a space (text copied from a mail into a call keeps its tokens), a sudoku cell is the
  same token in every position, and the tokens after a line break never depend on the text before it.
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
# In Qwen3 each tag is one token but not a special one: tags survive decoding with skip_special_tokens=True.
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

# Text is cut into these pieces, and BPE merges only within a piece. In order: the constant zeros of an
# eight-digit id, a year, other digits one by one, a word, a mail domain, escaped newlines in JSON, a
# backslash, punctuation (`": "` is one piece), whitespace.
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

# The format of Qwen3's replies and tool calls, as a response template of transformers' `parse_response`.
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

# This training text makes a puzzle's cell and the space or newline after it one token, whatever the other
# texts are.
CELLS = " ".join("0123456789_") + " \n" + "\n".join("0123456789_") + "\n"

# The text that every tool call shares. `boilerplate` does not find it, as it is not a whole line.
CALL_PHRASES = ('{"name": "', '", "arguments": {"')


def chat_template() -> str:
    """Returns the tiny policy's chat template, as Jinja source."""
    return (ASSETS / "chat_template.jinja").read_text(encoding="utf-8")


def boilerplate(
    texts: Sequence[str], min_share: float = 0.01, min_count: int = 8, min_chars: int = 16
) -> list[str]:
    """Returns the lines (with their newline) that many of the texts contain, longest first.

    texts: rendered conversations. Lines of assistants and tools do not count: the policy writes and copies
    these piece by piece. Only ASCII lines are returned, as the byte-level decoder reads other characters of
    an added token as bytes.
    """
    replies = re.compile(
        rf"{re.escape(START)}assistant\n.*?{re.escape(END)}|<tool_response>.*?</tool_response>", re.DOTALL
    )
    tags = re.compile("|".join(map(re.escape, (PAD, START, END, *TAGS))))
    counts: Counter[str] = Counter()
    for text in texts:
        # The text is cut at the tags, as an added token must not contain one.
        counts.update(
            {line for part in tags.split(replies.sub("", text)) for line in part.splitlines(keepends=True)}
        )
    least = max(min_count, min_share * len(texts))
    lines = [line for line, n in counts.items() if n >= least and len(line) >= min_chars and line.isascii()]
    return sorted(lines, key=lambda line: (-len(line), line))


def build_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Returns the tiny policy's tokenizer, with merges and boilerplate learned from conversations.

    texts: conversations rendered by `render`. vocab_size: the upper limit, special tokens and boilerplate
    included. The tokenizer encodes and decodes any text exactly.
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
    # Each line of boilerplate is a token already, so BPE learns from the rest.
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
    """Returns a conversation as text, by the tiny policy's chat template; needs no tokenizer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], tools=tools, chat_template=chat_template())
    return rendered[0]


@dataclass
class Shape:
    """The shape of a Qwen3 model, in fields of Qwen3Config. The defaults are the tiny policy's."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32


def build_model(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, shape: Shape | None = None
) -> Qwen3ForCausalLM:
    """Returns an untrained Qwen3 model in float32: the tiny policy, or a larger one if `shape` says so."""
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
