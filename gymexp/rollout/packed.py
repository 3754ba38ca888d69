"""Packs rollouts for the rank that trains on them. Pure.

A rank needs the tokens, the reward and the versions of its rollouts, and nothing that is for readers. Turns
share their tokens (each prompt continues the turn before), so these are packed once, as arrays.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Literal

from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Span, Task, Truncated, Turn, task_of

# Four and eight bytes: ids are below 2**31, and log-probabilities stay exact. `struct` packs a list more than
# twice as fast as `array` and numpy do.
_ID: Literal["i"] = "i"
_LOGPROB: Literal["d"] = "d"


def pack(outcomes: Sequence[Outcome]) -> list[Any]:
    """Returns the outcomes as plain values that are pickled fast, without items, verdicts, rows of tasks and
    details of failures. Their turns must be verified (`tokens.verify_turns`)."""
    return [_pack(outcome) for outcome in outcomes]


def unpack(packed: Sequence[Any]) -> list[Outcome]:
    """Returns the outcomes of `pack`. What they lost is empty."""
    return [_unpack(*one) for one in packed]


def _pack(outcome: Outcome) -> tuple[Any, ...]:
    task = task_of(outcome)
    named = task.key, task.env, task.agent
    if isinstance(outcome, Failed):
        return named, outcome.cause, None
    rollout = outcome.rollout
    last = rollout.turns[-1]
    lengths = [(len(turn.prompt_ids), len(turn.completion_ids)) for turn in rollout.turns]
    spans = [turn.versions for turn in rollout.turns]
    ids = _bytes_of(_ID, last.prompt_ids + last.completion_ids)
    logprobs = _bytes_of(_LOGPROB, [value for turn in rollout.turns for value in turn.logprobs])
    tokens = lengths, spans, ids, logprobs
    limit = outcome.limit if isinstance(outcome, Truncated) else None
    return named, limit, (rollout.reward, rollout.weights_version, tokens)


def _unpack(named: tuple[str, str, str], why: Any, played: tuple[Any, ...] | None) -> Outcome:
    """why: the cause of a failure; else the limit that was reached, or None."""
    task = Task(*named, row={})
    if played is None:
        return Failed(task, why, "")
    reward, version, tokens = played
    rollout = Rollout(task, _turns(*tokens), reward, [], version)
    return Truncated(rollout, why) if why else Completed(rollout)


def _turns(
    lengths: Sequence[tuple[int, int]], spans: Sequence[list[Span]], ids: bytes, logprobs: bytes
) -> list[Turn]:
    tokens = _values_of(_ID, ids)
    values = _values_of(_LOGPROB, logprobs)
    turns, first = [], 0
    for (num_prompt, num_sampled), versions in zip(lengths, spans, strict=True):
        end = num_prompt + num_sampled
        sampled = values[first : first + num_sampled]
        turns.append(Turn(tokens[:num_prompt], tokens[num_prompt:end], sampled, versions))
        first += num_sampled
    return turns


def _values_of(kind: Literal["i", "d"], data: bytes) -> list[Any]:
    return memoryview(data).cast(kind).tolist()


def _bytes_of(kind: str, values: Sequence[float]) -> bytes:
    return struct.pack(f"{len(values)}{kind}", *values)
