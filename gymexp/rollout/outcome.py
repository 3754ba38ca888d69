"""The nouns of a rollout: what passes between data, collection, batching, training and the rollout files.

Everything here is a frozen dataclass with plain values, so that any process may write, read or send it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1

Cause = Literal["environment", "engine", "timeout", "token_mismatch", "prompt_too_long"]
Limit = Literal["length", "turns"]


@dataclass(frozen=True)
class Task:
    """One dataset row of one environment. `key` ("sudoku/train/000123") is also the trainer's prompt."""

    key: str
    env: str
    agent: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What one sampling saw and gave.

    prompt_ids: token ids the engine was given. completion_ids and logprobs: the sampled ids and their
    log-probabilities under the sampling distribution (nats), of equal length.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Rollout:
    """One episode of one task: its turns, its reward, and what was said and done (`items`, NeMo Gym's
    output).

    weights_version: optimizer steps behind the weights that sampled it, as the engine says; None where the
    gateway was restarted and nobody knows any more.
    refused: what the environment said where it refused the policy's words (400 or 422) in place of scoring
    them; the reward is `env.<name>.refused_reward` then.
    """

    task: Task
    turns: list[Turn]
    reward: float
    items: list[dict[str, Any]]
    weights_version: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True)
class Completed:
    """The episode ended by itself and was scored. failures: why earlier attempts at it failed."""

    rollout: Rollout
    failures: list[Cause] = field(default_factory=list)


@dataclass(frozen=True)
class Truncated:
    """A length or turn limit cut the episode; the reward is the environment's score of what there was."""

    rollout: Rollout
    limit: Limit
    failures: list[Cause] = field(default_factory=list)


@dataclass(frozen=True)
class Failed:
    """No reward: after the allowed retries the episode could not be played. cause and detail: of the last
    attempt, failures: of all. `log` is where to look. A prompt_too_long is no server's failure: it is not
    retried, and no failure in the share that ends a run."""

    task: Task
    cause: Cause
    detail: str
    log: str = ""
    failures: list[Cause] = field(default_factory=list)


Played = Completed | Truncated
Outcome = Played | Failed


def task_of(outcome: Outcome) -> Task:
    """The task that was played, or failed to be."""
    return outcome.task if isinstance(outcome, Failed) else outcome.rollout.task


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """One line of `rollouts/step-N.jsonl.zst`; the task's row is left out (it stands in `data/`).

    Shallow: orjson writes the turns, dataclasses themselves, without copies of their token lists.
    """
    task = {k: v for k, v in vars(task_of(outcome)).items() if k != "row"}
    record = dict(vars(outcome))
    if isinstance(outcome, Failed):
        record["task"] = task
    else:
        record["rollout"] = vars(outcome.rollout) | {"task": task}
    return {"schema": SCHEMA_VERSION, "outcome": type(outcome).__name__.lower()} | record
