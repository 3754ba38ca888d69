"""A generation that updates of the weights cut into pieces. An engine continues it after each update.

The engine gets the prompt and all earlier pieces as its prompt, and so computes their keys and values anew.
Every piece is sampled with weights of one version, has a seed of its own (`draws.piece_seed`) and gets what
is left of `max_tokens`. Pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from gymexp.rollout.draws import piece_seed
from gymexp.rollout.generation import FinishReason, Generation
from gymexp.rollout.outcome import Span


class Pieces:
    """The pieces of one generation so far.

    prompt_ids, sampling_params: of the whole generation. decode: returns the text of token ids; needed only
    if sampling_params has `stop`.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.finish_reason: FinishReason = "abort"  # of the whole generation; "abort" while it is unfinished
        self._prompt_ids = prompt_ids
        self._params = sampling_params
        self._decode = decode
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[Span] | None = []

    @property
    def is_finished(self) -> bool:
        return self.finish_reason != "abort"

    def payload(self, model: str | None = None) -> bytes:
        """Returns the body of the request for the next piece. model: the engine's name of what is to sample;
        None for its only model."""
        params = dict(self._params)
        if params.get("seed") is not None:
            params["seed"] = piece_seed(params["seed"], len(self._ids))
        if (left := self._left()) is not None:
            params["max_tokens"] = left
        body = {"token_ids": self._prompt_ids + self._ids, "sampling_params": params}
        return orjson.dumps(body if model is None else body | {"model": model})

    def add(self, piece: Generation) -> None:
        """Adds the engine's answer to the last payload."""
        begin = len(self._ids)
        self._ids += piece.token_ids
        self._logprobs += piece.logprobs
        if piece.token_ids:
            self._versions = joined(self._versions, piece.versions)
        self.finish_reason = piece.finish_reason
        if (end := self._end_of_stop_text(begin)) is not None:
            self._ids, self._logprobs = self._ids[:end], self._logprobs[:end]
            self._versions = None if self._versions is None else first_tokens(self._versions, end)
            self.finish_reason = "stop"
        elif self.finish_reason == "abort" and self._ids:
            # The last token may end the generation, though the cut was faster than the engine's own check.
            if self._ids[-1] in self._params.get("stop_token_ids", ()):
                self.finish_reason = "stop"
            elif self._left() == 0:
                self.finish_reason = "length"

    def whole(self) -> Generation:
        """Returns all pieces as one generation."""
        return Generation(self._ids, self._logprobs, self.finish_reason, self._versions)

    def _left(self) -> int | None:
        """Returns how many tokens may still be sampled; None for no limit."""
        limit = self._params.get("max_tokens")
        return None if limit is None else limit - len(self._ids)

    def _end_of_stop_text(self, begin: int) -> int | None:
        """Returns how many tokens there are up to and with the end of a stop string that the engine cannot
        have seen, as it began in an earlier piece; None if there is none. begin: of the last piece.

        The engine may have gone on after it. To leave those tokens out does not change the distribution of
        the others, as whether a token is left out depends on the tokens before it alone.
        """
        stops = self._params.get("stop") or []
        if not stops or self._decode is None:
            return None
        # A token may be a single byte of a character, so the longest stop string may take this many tokens.
        window = 4 * max(map(len, stops)) + 8
        ends = list(range(begin + 1, min(len(self._ids), begin + window) + 1)) if begin else []
        if self.finish_reason == "abort":
            ends.append(len(self._ids))  # the cut may have been faster than the engine's own check
        for end in ends:
            text = self._decode(self._ids[max(0, end - window) : end])
            if any(stop in text for stop in stops):
                return end
        return None


def joined(first: list[Span] | None, second: list[Span] | None) -> list[Span] | None:
    """Returns the versions of two pieces together; None if those of either are unknown."""
    if first is None or second is None:
        return None
    spans: list[Span] = []
    for version, count in first + second:
        if spans and spans[-1][0] == version:
            spans[-1] = version, spans[-1][1] + count
        elif count:
            spans.append((version, count))
    return spans


def first_tokens(versions: list[Span], num_tokens: int) -> list[Span]:
    """Returns the versions of the first `num_tokens` tokens."""
    spans: list[Span] = []
    for version, count in versions:
        if (kept := min(count, num_tokens)) > 0:
            spans.append((version, kept))
        num_tokens -= count
    return spans
