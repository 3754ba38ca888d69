"""The hf engine: samples from the live weights of a transformers model, in the trainer's own process.

One worker thread runs a token step at a time over all running requests (continuous batching): new requests
are prefilled and join, every row gets one token, finished and cancelled rows leave. Whatever prefix a new
prompt has in common with a running row, or with one that finished lately, is copied and not computed again,
as long as the weights are the same. That covers the rollouts of a group and the next turn of each.

The model is the object in training. While a token step runs, it is in eval mode, without gradients, and its
attention is `slot_attention`; between steps it is exactly as the trainer left it. The trainer must not run or
change the model during a token step: it does so inside `with engine.paused():`, or when no request is in
flight.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from gymexp.engine.hf.batch import Batch
from gymexp.engine.hf.prefix import Row
from gymexp.engine.hf.sampling import SamplingParams
from gymexp.rollout.generation import EngineError, FinishReason, Generation

log = logging.getLogger(__name__)


class HFEngine:
    """Samples token ids for token ids; see the module's docstring for what it shares with the trainer.

    model: a causal LM with full attention, not wrapped (no DDP, FSDP or ZeRO-3); LoRA's layers may be inside
    it. eos_token_ids end every request. max_batch_size: rows of a token step; further requests wait.
    max_model_len: prompt and generation together; None is the model's own. kept_tokens: how many tokens of
    finished rows to keep keys and values of, 0 for none. tokenizer: only for requests with `stop`. dtype: of
    the arithmetic, where it is not that of the weights.
    weights_version: the trainer sets it, inside `paused()`, whenever it changed the weights.

    An error in a token step fails the requests of the batch, with the cause, and drops everything computed;
    the engine then goes on with the requests that wait. So a passing fault costs one batch, and with a
    lasting one every request fails at once: none hangs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        max_batch_size: int = 64,
        max_model_len: int | None = None,
        kept_tokens: int = 65_536,
        tokenizer: Any = None,
        dtype: torch.dtype = torch.float32,
    ):
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be >= 1, got {max_batch_size}")
        config = model.config.get_text_config()
        self.max_model_len: int = max_model_len or config.max_position_embeddings
        self.weights_version = 0
        self._batch = Batch(model, max_batch_size, kept_tokens, pad_token_id, tokenizer, dtype)
        self._device = model.device
        self._vocab_size: int = config.vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._has_tokenizer = tokenizer is not None
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()
        self._pauses = 0
        self._stepping = False
        self._closed = False
        self._counts = {"requests": 0, "finished": 0, "cancelled": 0, "failed": 0}
        self._busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="hf-engine", daemon=True)
        self._thread.start()

    def submit(self, token_ids: Sequence[int], params: SamplingParams) -> Future[Generation]:
        """Queue a prompt; from any thread. Cancelling the future takes the row out at the next token.

        Raises ValueError for a prompt that is empty, too long or outside the vocabulary; EngineError when
        closed. The future's callbacks run in the engine's thread: keep them short.
        """
        ids = np.asarray(token_ids, dtype=np.int64)
        if ids.ndim != 1 or not len(ids):
            raise ValueError("token_ids must be a list of at least one id")
        room = self.max_model_len - len(ids)
        if room < 1:
            raise ValueError(
                f"token_ids must be shorter than max_model_len={self.max_model_len}, got {len(ids)} ids"
            )
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise ValueError(f"token_ids must be in 0..{self._vocab_size - 1}, got {ids.min()}..{ids.max()}")
        if params.stop and not self._has_tokenizer:
            raise ValueError("stop needs an engine with a tokenizer; use stop_token_ids")
        limit = min(params.max_tokens or room, room)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_token_ids)
        row = Row(ids, limit, params, ends, Future(), random.Random(params.seed))
        row.future.add_done_callback(self._count_cancelled)
        with self._changed:
            if self._closed:
                raise EngineError("the hf engine is closed")
            self._counts["requests"] += 1
            self._waiting.append(row)
            self._changed.notify_all()
        return row.future

    def pause(self) -> None:
        """Returns when no token step runs; none starts until `resume`. Pauses nest; requests stay."""
        with self._changed:
            self._pauses += 1
            self._changed.wait_for(lambda: not self._stepping)

    def resume(self) -> None:
        with self._changed:
            self._pauses -= 1
            self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def free_memory(self) -> None:
        """Drop what is kept of finished rows and, if no row is running, the batch's keys and values too."""
        with self.paused():
            self._batch.free_memory()

    def stats(self) -> dict[str, float]:
        """Counts since the start, tokens_per_s while at work, and how many requests run and wait now."""
        with self._changed:
            return {
                **self._counts,
                "tokens": self._batch.tokens,
                "prompt_tokens": self._batch.prompt_tokens,
                "reused_prompt_tokens": self._batch.reused_prompt_tokens,
                "tokens_per_s": round(self._batch.tokens / self._busy_s, 1) if self._busy_s else 0.0,
                "in_flight": len(self._batch.rows),
                "waiting": len(self._waiting),
                "weights_version": self.weights_version,
            }

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """End the worker after the running token step; what is in flight fails with EngineError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The worker thread

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        try:
            while self._await_work():
                for tell in self._step():
                    tell()
        finally:
            with self._changed:
                self._closed = True
                left = self._batch.clear() + list(self._waiting)
                self._waiting.clear()
            for tell in self._fail(left, EngineError("the hf engine was closed before the request ended")):
                tell()

    def _await_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (not self._pauses and (self._waiting or self._batch.rows))
            )
            self._stepping = not self._closed
            return not self._closed

    def _step(self) -> list[Callable[[], None]]:
        """One token step. Returns what tells the callers; called after it, they find the model at rest."""
        started = time.perf_counter()
        try:
            ended = self._batch.step(self._waiting, self.weights_version)
            return [self._succeed(row, reason) for row, reason in ended]
        except Exception as error:
            log.exception("a token step of the hf engine failed")
            failure = EngineError(f"the hf engine failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            return self._fail(self._batch.clear(), failure)
        finally:
            self._busy_s += time.perf_counter() - started
            with self._changed:
                self._stepping = False
                self._changed.notify_all()

    def _fail(self, rows: Sequence[Row], error: EngineError) -> list[Callable[[], None]]:
        def failure_of(row: Row) -> Callable[[], None]:
            def tell() -> None:
                if row.future.set_running_or_notify_cancel():
                    self._counts["failed"] += 1
                    row.future.set_exception(error)

            return tell

        return [failure_of(row) for row in rows]

    def _succeed(self, row: Row, reason: FinishReason) -> Callable[[], None]:
        ids = row.ids[row.prompt_length : row.length].tolist()
        generation = Generation(ids, row.logprobs, reason, (row.first_version, row.last_version))

        def tell() -> None:
            if row.future.set_running_or_notify_cancel():
                self._counts["finished"] += 1
                row.future.set_result(generation)

        return tell

    def _count_cancelled(self, future: Future[Generation]) -> None:
        if future.cancelled():
            with self._changed:
                self._counts["cancelled"] += 1
                self._changed.notify_all()
