"""The running batch of the hf engine: rows join by a prefill, get one token a step, and leave.

The prefill leaves out the last token of a prompt, which is the input of the row's first token step. So all
sampling happens in one place, and rows with the same prompt need only one prefill.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from gymexp.engine.hf.cache import GRAIN, SLOT_ATTENTION, SlotCache, check_supported
from gymexp.engine.hf.prefix import PrefixStore, Row
from gymexp.engine.hf.sampling import sample_tokens
from gymexp.rollout.generation import FinishReason

PREFILL_TOKENS = 4096  # tokens of one prefill forward, padding included; bounds its memory


class Batch:
    """The running rows, and their keys and values; row i has slot i. Only the engine's thread may use it."""

    def __init__(
        self,
        model: PreTrainedModel,
        max_rows: int,
        kept_tokens: int,
        pad_token_id: int,
        tokenizer: Any,
        dtype: torch.dtype,
    ):
        config = model.config.get_text_config()
        check_supported(config, type(model).__name__)
        self.rows: list[Row] = []
        self.max_rows = max_rows
        self.tokens = self.prompt_tokens = self.reused_prompt_tokens = 0
        self._joining: list[Row] = []  # taken out of the queue, but not yet in `rows`
        self._model = model
        self._dtype = dtype
        self._pad_token_id = pad_token_id
        self._tokenizer = tokenizer
        self._cache = SlotCache(config.num_hidden_layers, max_rows)
        self._prefixes = PrefixStore(kept_tokens)

    def step(self, waiting: deque[Row], version: int) -> list[tuple[Row, FinishReason]]:
        """Prefills waiting rows, samples a token for every row, and removes and returns the rows that ended.

        version: of the model's weights. Rows whose future was cancelled are removed and not returned. Raises
        FloatingPointError if logits are not finite, and whatever the model raises; the caller must then clear
        the batch.
        """
        self._leave([row for row in self.rows if row.future.cancelled()])
        self._prefixes.use_version(version)
        # no_grad, not inference_mode: the model may keep a tensor of this block in one of its buffers.
        with torch.no_grad(), self._arithmetic(), _sampling_mode(self._model):
            while wave := self._take_wave(waiting):
                self._prefill(wave, version)
            if not self.rows:
                return []
            ids = np.array([[row.ids[row.length - 1]] for row in self.rows])
            logits = self._forward(0, ids, np.array([row.length - 1 for row in self.rows]))
            uniforms = [row.rng.random() for row in self.rows]
            params = [row.params for row in self.rows]
            histories = [row.ids[: row.length] for row in self.rows]
            tokens, logprobs = sample_tokens(logits, params, uniforms, histories)
        if not all(map(math.isfinite, logprobs)):
            raise FloatingPointError(f"the logits are not finite (weights_version {version})")
        self.tokens += len(tokens)
        ended: list[tuple[Row, FinishReason]] = []
        for row, token, logprob in zip(self.rows, tokens, logprobs, strict=True):
            reason = row.append(token, logprob, version, self._tokenizer)
            if reason is not None:
                ended.append((row, reason))
        self._leave([row for row, _ in ended])
        return ended

    def _arithmetic(self) -> torch.autocast:
        """Returns autocast to `dtype`, switched off for float32."""
        enabled = self._dtype is not torch.float32
        return torch.autocast(self._model.device.type, self._dtype if enabled else None, enabled)

    def clear(self) -> list[Row]:
        """Removes and returns all rows. Drops keys and values, which may be half written after an error."""
        rows = self.rows + [row for row in self._joining if row not in self.rows]
        self.rows = []
        self._joining = []
        self.free_memory()
        return rows

    def free_memory(self) -> None:
        """Drops the prefixes of finished rows and, if no row is running, the cache of the batch."""
        self._prefixes.clear()
        if not self.rows:
            self._cache.clear()

    def _take_wave(self, waiting: deque[Row]) -> list[Row]:
        """Takes rows out of `waiting` to prefill together. A row that can copy a long prefix from another row
        of the wave stays in `waiting` for the next wave.
        """
        wave: list[Row] = []
        postponed: list[Row] = []
        while waiting and len(self.rows) + len(self._joining) < self.max_rows:
            row = waiting.popleft()
            if row.future.cancelled():
                continue
            self._joining.append(row)
            (wave if self._prefixes.find(row, self.rows, wave) else postponed).append(row)
        waiting.extendleft(reversed(postponed))
        self._joining = []
        return wave

    def _prefill(self, wave: list[Row], version: int) -> None:
        """Adds the wave to `rows`, and computes the keys and values of its prompts without their last tokens,
        in batches of similar length.
        """
        wave.sort(key=lambda row: (row.reused > 0, row.num_new), reverse=True)
        first = len(self.rows)
        self.rows.extend(wave)
        self._cache.reserve(len(self.rows), max(row.length for row in wave) + GRAIN)
        for slot, row in enumerate(wave, first):
            row.kv_version = version
            self._prefixes.copy_into(self._cache, slot, row)
            self.prompt_tokens += row.length
            self.reused_prompt_tokens += row.reused
        done = 0
        while done < len(wave):
            group = wave[done : done + compute_prefill_size(wave[done:])]
            width = group[0].num_new
            if width:
                ids = np.full((len(group), width), self._pad_token_id)
                for line, row in zip(ids, group, strict=True):
                    line[: row.num_new] = row.ids[row.reused : row.length - 1]
                self._forward(first + done, ids, np.array([row.reused for row in group]))
            done += len(group)

    def _forward(self, first_slot: int, ids: np.ndarray, starts: np.ndarray) -> torch.Tensor:
        """Writes the keys and values of all columns, and returns the logits [rows, V] of the last column.

        ids: [rows, width], for the slots from first_slot on. starts: [rows], the position of each first id.
        """
        device = self._model.device
        width = ids.shape[1]
        mask = self._cache.aim(first_slot, starts, width, device)
        output = self._model(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=mask,
            position_ids=torch.from_numpy(starts[:, None] + np.arange(width)).to(device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _leave(self, rows: Sequence[Row]) -> None:
        """Removes rows. The last row moves into each freed slot, so that the used slots have no gaps."""
        for row in rows:
            slot = self.rows.index(row)
            self._prefixes.keep(self._cache, slot, row)
            last = self.rows.pop()
            if last is not row:
                self._cache.copy_row(len(self.rows), slot, last.length)
                self.rows[slot] = last


def compute_prefill_size(rows: Sequence[Row]) -> int:
    """Returns how many of the first rows to prefill at once: at most about a fifth of the tokens is padding.

    rows: those that reuse a prefix, then the others, each longest first. One prefill has rows of one kind.
    """
    longest = rows[0]
    size = 1
    while (
        size < len(rows)
        and (size + 1) * longest.num_new <= PREFILL_TOKENS
        and (rows[size].reused > 0) == (longest.reused > 0)
        and rows[size].num_new >= longest.num_new * 0.8 - 8
    ):
        size += 1
    return size


@contextmanager
def _sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switches dropout off and slot attention on within the block, and restores every module after it."""
    config = model.config.get_text_config()
    attention = config._attn_implementation
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.__dict__["training"] = False  # as eval() does, without a slow call for each module
    config._attn_implementation = SLOT_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = attention
        for module in training:
            module.__dict__["training"] = True
