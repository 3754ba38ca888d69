"""Rows of the hf engine, and the store of their prefixes, whose keys and values a new prompt can copy."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from gymexp.engine.hf.cache import LayerRows, SlotCache
from gymexp.engine.hf.sampling import SamplingParams
from gymexp.rollout.generation import FinishReason
from gymexp.rollout.outcome import Span

WORTH = 16  # tokens; a shorter common prefix is computed, as a copy would gain nothing


class Row:
    """One request in the engine: its ids so far, and where the keys and values of its prefix come from.

    limit: how many tokens it may generate. ends: ids that end it.
    """

    def __init__(
        self,
        prompt: np.ndarray,
        limit: int,
        params: SamplingParams,
        ends: frozenset[int],
        future: Future[Any],
        rng: random.Random,
    ):
        self.prompt_length = self.length = len(prompt)
        self.limit = limit
        self.ids = np.concatenate([prompt, np.zeros(min(limit, 64), dtype=np.int64)])
        self.logprobs: list[float] = []
        self.params = params
        self.ends = ends
        self.future = future
        self.rng = rng
        self.reused = 0  # leading tokens whose keys and values come from `donor`
        self.donor: int | Kept | None = None
        self.kv_version = 0
        self.versions: list[Span] = []

    @property
    def num_new(self) -> int:
        """The number of tokens of the prompt to prefill."""
        return self.length - 1 - self.reused

    @property
    def computed(self) -> np.ndarray:
        """The ids whose keys and values are computed: all but the last."""
        return self.ids[: self.length - 1]

    def append(self, token: int, logprob: float, version: int, tokenizer: Any) -> FinishReason | None:
        """Appends a sampled token. Returns the reason if the row ends with it, else None."""
        if self.length == len(self.ids):
            self.ids = np.concatenate([self.ids, np.zeros(len(self.ids), dtype=np.int64)])
        self.ids[self.length] = token
        self.length += 1
        self.logprobs.append(logprob)
        if self.versions and self.versions[-1][0] == version:
            self.versions[-1] = version, self.versions[-1][1] + 1
        else:
            self.versions.append((version, 1))
        if token in self.ends or (self.params.stop and self._ends_in_stop_text(tokenizer)):
            return "stop"
        return "length" if len(self.logprobs) == self.limit else None

    def _ends_in_stop_text(self, tokenizer: Any) -> bool:
        # A token may be a single byte of a character, so the longest stop string may take this many tokens.
        window = 4 * max(len(text) for text in self.params.stop) + 8
        start = max(self.prompt_length, self.length - window)
        text = tokenizer.decode(self.ids[start : self.length].tolist(), skip_special_tokens=False)
        return any(stop in text for stop in self.params.stop)


class Kept:
    """The ids of a finished row, and a copy of their keys and values."""

    def __init__(self, ids: np.ndarray, layers: LayerRows):
        self.ids = ids
        self.layers = layers


class PrefixStore:
    """The keys and values of finished rows, newest last, of at most `capacity` tokens and one weights
    version.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.version = 0
        self._kept: deque[Kept] = deque()
        self._tokens = 0

    def use_version(self, version: int) -> None:
        """Drops all prefixes if the version of the weights has changed."""
        if version != self.version:
            self.clear()
            self.version = version

    def clear(self) -> None:
        self._kept.clear()
        self._tokens = 0

    def find(self, row: Row, running: Sequence[Row], wave: Sequence[Row]) -> bool:
        """Sets the best donor in `row`: the running or kept row that shares the longest prefix with it.

        Returns False if a row of the wave will be a better donor once it is computed.
        """
        prompt = row.ids[: row.length - 1]
        row.donor, row.reused = None, 0
        best = WORTH - 1
        sources = [(slot, r.computed) for slot, r in enumerate(running) if r.kv_version == self.version]
        for donor, ids in [*sources, *((kept, kept.ids) for kept in reversed(self._kept))]:
            # A better donor agrees with the prompt at position `best`. Most candidates fail this quick test.
            if best < len(ids) and best < len(prompt) and ids[best] == prompt[best]:
                shared = common_prefix(ids, prompt)
                if shared > best:
                    best = shared
                    row.donor, row.reused = donor, shared
        minimum = best + 2 * WORTH
        return not any(common_prefix(other.computed, prompt) >= minimum for other in wave)

    def copy_into(self, cache: SlotCache, slot: int, row: Row) -> None:
        """Copies the reused prefix from the row's donor into its slot."""
        if isinstance(row.donor, Kept):
            cache.write_row(slot, row.donor.layers, row.reused)
        elif row.donor is not None:
            cache.copy_row(row.donor, slot, row.reused)
        row.donor = None

    def keep(self, cache: SlotCache, slot: int, row: Row) -> None:
        """Keeps the keys and values of a leaving row, in place of kept rows that are prefixes of it."""
        ids = row.computed.copy()
        if row.kv_version != self.version or len(ids) > self.capacity:
            return
        for kept in [k for k in self._kept if common_prefix(k.ids, ids) == len(k.ids)]:
            self._drop(kept)
        self._kept.append(Kept(ids, cache.read_row(slot, len(ids))))
        self._tokens += len(ids)
        while self._tokens > self.capacity:
            self._drop(self._kept[0])

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self._tokens -= len(kept.ids)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Returns how many leading ids two prompts share."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size
