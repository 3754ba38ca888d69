"""The hf engine: samples from the live weights of a transformers model, in the trainer's own process.

One worker thread runs token steps over all running requests (continuous batching). In a step, new requests
are prefilled and join, every row gets one token, and finished and cancelled rows leave. If a new prompt
shares a prefix with a running row, or with a row that finished lately under the same weights, the prefix's
keys and values are copied instead of computed. This covers the rollouts of a group, and the next turn of
each.

The model is the trainer's own object. During a token step the model is in eval mode, without gradients, and
its attention is `slot_attention`; between steps it is exactly as the trainer left it. The trainer must not
run or change the model during a token step, but only inside `with engine.paused():` or while no request is in
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
    """Samples token ids for prompts of token ids, from a model that the trainer changes in the same process.

    model: a causal LM with full attention, not wrapped (no DDP, FSDP or ZeRO-3); it may contain LoRA's
    layers. eos_token_ids: each ends a request. max_batch_size: number of rows of a token step; further
    requests wait. max_model_len: tokens of prompt and generation together; None for the model's own limit.
    kept_tokens: how many tokens of finished rows keep their keys and values, 0 for none. tokenizer: needed
    only for requests with `stop`. dtype: of the arithmetic, by autocast unless it is float32.
    weights_version: the trainer sets it, inside `paused()`, whenever it changed the weights.

    An error in a token step fails the requests of the batch, with the cause, and drops all keys and values.
    The engine then goes on with the waiting requests. So a passing fault costs one batch, a lasting fault
    fails every request at once, and no request hangs.
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
        """Queues a prompt and returns the future of its generation. Any thread may call it. Cancelling the
        future removes the request from the batch at the next token.

        Raises ValueError if the prompt is empty, too long or outside the vocabulary, or if `params` has
        `stop` and the engine no tokenizer; EngineError if the engine is closed. The future's callbacks run in
        the engine's thread, and must be short.
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
        """Waits for the running token step to end, and starts no other until `resume`. Pauses nest. Requests
        stay in the batch and in the queue.
        """
        with self._changed:
            self._pauses += 1
            self._changed.wait_for(lambda: not self._stepping)

    def resume(self) -> None:
        """Ends one `pause`; token steps go on once all pauses have ended."""
        with self._changed:
            self._pauses -= 1
            self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses the engine within the block."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def cut(self) -> None:
        """Ends all requests, also those that wait, with what they have (finish_reason "abort"). The engine
        must be paused."""
        with self._changed:
            assert self._pauses and not self._stepping, "pause first"
            rows = self._batch.clear() + list(self._waiting)
            self._waiting.clear()
        for row in rows:
            self._succeed(row, "abort")()

    def free_memory(self) -> None:
        """Drops the keys and values of finished rows and, if no row is running, those of the batch too."""
        with self.paused():
            self._batch.free_memory()

    def stats(self) -> dict[str, float]:
        """Returns counts since the start, tokens per second of work, and how many requests run and wait."""
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
        """Ends the worker thread after the running token step. Requests in flight fail with EngineError."""
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
                for notify in self._step():
                    notify()
        finally:
            with self._changed:
                self._closed = True
                left = self._batch.clear() + list(self._waiting)
                self._waiting.clear()
            error = EngineError("the hf engine was closed before the request ended")
            for notify in self._fail(left, error):
                notify()

    def _await_work(self) -> bool:
        """Waits until a token step may start, and returns True; False if the engine was closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (not self._pauses and (self._waiting or self._batch.rows))
            )
            self._stepping = not self._closed
            return not self._closed

    def _step(self) -> list[Callable[[], None]]:
        """Runs one token step. Returns functions that resolve the futures of ended rows. They are called
        after the step, so that a future's callbacks find the model as the trainer left it.
        """
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
        """Returns a function for each row that sets the error in its future."""

        def notifier_of(row: Row) -> Callable[[], None]:
            def notify() -> None:
                if row.future.set_running_or_notify_cancel():
                    self._counts["failed"] += 1
                    row.future.set_exception(error)

            return notify

        return [notifier_of(row) for row in rows]

    def _succeed(self, row: Row, reason: FinishReason) -> Callable[[], None]:
        """Returns a function that sets the row's generation in its future."""
        ids = row.ids[row.prompt_length : row.length].tolist()
        generation = Generation(ids, row.logprobs, reason, row.versions)

        def notify() -> None:
            if row.future.set_running_or_notify_cancel():
                self._counts["finished"] += 1
                row.future.set_result(generation)

        return notify

    def _count_cancelled(self, future: Future[Generation]) -> None:
        if future.cancelled():
            with self._changed:
                self._counts["cancelled"] += 1
                self._changed.notify_all()
