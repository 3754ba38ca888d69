"""The running batch of the hf engine: rows join by prefill, take one token a step, and leave.

The last token of a prompt is not prefilled; it is the row's first token step, so that all sampling happens in
one place and rows with the same prompt need one prefill only.
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

PREFILL_TOKENS = 4096  # padded tokens of one prefill forward: bounds its memory


class Batch:
    """Rows with their keys and values; row i lies in slot i. Only the engine's thread touches it."""

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
        self._taken: list[Row] = []  # out of the queue and not yet in `rows`
        self._model = model
        self._dtype = dtype
        self._pad_token_id = pad_token_id
        self._tokenizer = tokenizer
        self._cache = SlotCache(config.num_hidden_layers, max_rows)
        self._prefixes = PrefixStore(kept_tokens)

    def step(self, waiting: deque[Row], version: int) -> list[tuple[Row, FinishReason]]:
        """Let waiting rows in, give every row one token, and let go of those that ended, which are returned.

        Rows whose future was cancelled leave unmentioned. Raises FloatingPointError where logits are not
        finite, and whatever the model raises; the batch must then be cleared.
        """
        self._leave([row for row in self.rows if row.future.cancelled()])
        self._prefixes.use_version(version)
        # no_grad, not inference_mode: a tensor that is made here may end up in one of the model's buffers.
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
        enabled = self._dtype is not torch.float32
        return torch.autocast(self._model.device.type, self._dtype if enabled else None, enabled)

    def clear(self) -> list[Row]:
        """Drop and return all rows, and drop what was computed: after an error it may be half written."""
        rows = self.rows + [row for row in self._taken if row not in self.rows]
        self.rows = []
        self._taken = []
        self.free_memory()
        return rows

    def free_memory(self) -> None:
        self._prefixes.clear()
        if not self.rows:
            self._cache.clear()

    def _take_wave(self, waiting: deque[Row]) -> list[Row]:
        """Waiting rows to prefill together. One that would repeat one of these stays for the next."""
        wave: list[Row] = []
        put_off: list[Row] = []
        while waiting and len(self.rows) + len(self._taken) < self.max_rows:
            row = waiting.popleft()
            if row.future.cancelled():
                continue
            self._taken.append(row)
            (wave if self._prefixes.find(row, self.rows, wave) else put_off).append(row)
        waiting.extendleft(reversed(put_off))
        self._taken = []
        return wave

    def _prefill(self, wave: list[Row], version: int) -> None:
        """Compute keys and values of these prompts but for their last token, in batches of similar length."""
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
        """Logits [rows, V] of the last column, after writing keys and values of all columns."""
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
        """Take rows out; the last row moves into each hole, so that slots stay without gaps."""
        for row in rows:
            slot = self.rows.index(row)
            self._prefixes.keep(self._cache, slot, row)
            last = self.rows.pop()
            if last is not row:
                self._cache.copy_row(len(self.rows), slot, last.length)
                self.rows[slot] = last


def compute_prefill_size(rows: Sequence[Row]) -> int:
    """How many of these rows, longest first, to prefill at once: at most a fifth of it is padding."""
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
    """Dropout off and slot attention on; afterwards every module is as it was."""
    config = model.config.get_text_config()
    attention = config._attn_implementation
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.__dict__["training"] = False  # what eval() sets, without a call for each module
    config._attn_implementation = SLOT_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = attention
        for module in training:
            module.__dict__["training"] = True
