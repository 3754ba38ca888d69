"""The types of a rollout, which data, collection, batching, training and the rollout files have in common.

Every type is a frozen dataclass with plain values, so that any process may write, read or send it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 2

Cause = Literal["environment", "engine", "timeout", "token_mismatch", "prompt_too_long"]
Limit = Literal["length", "turns"]
Span = tuple[int, int]  # a version of the weights, in optimizer steps done, and how many tokens it sampled


@dataclass(frozen=True)
class Task:
    """One dataset row of one environment. `key` ("sudoku/train/000123") is also the trainer's prompt."""

    key: str
    env: str
    agent: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One sampling call of a rollout.

    prompt_ids: the token ids that the engine got. completion_ids and logprobs: the sampled ids and their
    log-probabilities under the sampling distribution (nats), of equal length. versions: which weights sampled
    the completion, from its first token to its last; more than one span if updates of the weights cut the
    call. Empty if it is unknown.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    versions: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class Rollout:
    """One episode of one task: its turns and its reward.

    items: messages and tool calls of the episode, as NeMo Gym's output has them. verdict: the other fields of
    the environment's answer, without the task's own, by which a reader sees why it gave the reward.
    weights_version: optimizer steps behind the weights that sampled the rollout's oldest token; None if it is
    unknown, as after a restart of the gateway. refused: the environment's message if it refused the
    policy's reply (400 or 422) instead of scoring it, else ""; the reward is then
    `env.<name>.refused_reward`.

    usage: None, unless the policy gives no token ids (an endpoint, in an evaluation): `turns` is empty then,
    and usage has the number of the policy's `turns`, and `prompt_tokens` and `completion_tokens` of all of
    them if the endpoint counts them.

    Of the attempt that counts: began, the time of day (seconds since 1970); seconds, `total`, `policy` (of
    the policy's turns) and `queue` (since the collection began, earlier attempts included); seed; replica,
    the name of the environment's instance that played it.
    """

    task: Task
    turns: list[Turn]
    reward: float
    items: list[dict[str, Any]]
    weights_version: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    verdict: dict[str, Any] = field(default_factory=dict)
    began: float = 0.0
    seed: int | None = None
    replica: str = ""
    usage: dict[str, int] | None = None


@dataclass(frozen=True)
class Completed:
    """The episode ended by itself and has a reward. failures: the causes of earlier failed attempts."""

    rollout: Rollout
    failures: list[Cause] = field(default_factory=list)


@dataclass(frozen=True)
class Truncated:
    """A length or turn limit ended the episode. The reward is the environment's score of the cut episode."""

    rollout: Rollout
    limit: Limit
    failures: list[Cause] = field(default_factory=list)


@dataclass(frozen=True)
class Failed:
    """The episode could not be played within the allowed retries, and has no reward.

    cause, detail: of the last attempt. failures: the causes of all attempts. log: the log file that may
    explain the failure, or "". The cause prompt_too_long is no failure of a server: gymexp does not retry the
    rollout, and does not count it in the share of failures that ends a run.
    """

    task: Task
    cause: Cause
    detail: str
    log: str = ""
    failures: list[Cause] = field(default_factory=list)


Played = Completed | Truncated
Outcome = Played | Failed


def task_of(outcome: Outcome) -> Task:
    """Returns the task that the outcome is of."""
    return outcome.task if isinstance(outcome, Failed) else outcome.rollout.task


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """Returns one line of `rollouts/step-N.jsonl.zst`, without the task's row, which is in `data/`.

    The turns stay dataclasses: orjson writes them without a copy of their token lists.
    """
    task = {k: v for k, v in vars(task_of(outcome)).items() if k != "row"}
    record = dict(vars(outcome))
    if isinstance(outcome, Failed):
        record["task"] = task
    else:
        record["rollout"] = vars(outcome.rollout) | {"task": task}
    return {"schema": SCHEMA_VERSION, "outcome": type(outcome).__name__.lower()} | record


def outcome_from_json(record: Mapping[str, Any], task: Task | None = None) -> Outcome:
    """Returns the outcome of one line of a file of rollouts, of any schema version. Fields that the line
    lacks have their default. task: the line's task; if it is not given, the task has no row."""
    fields = {k: v for k, v in record.items() if k not in ("schema", "outcome", "task", "rollout")}
    task = task or Task(**(record.get("rollout") or record)["task"], row={})
    if record["outcome"] == "failed":
        return Failed(task, **fields)
    turns = [_turn_from_json(turn) for turn in record["rollout"]["turns"]]
    rollout = Rollout(**(record["rollout"] | {"task": task, "turns": turns}))
    return Completed(rollout, **fields) if record["outcome"] == "completed" else Truncated(rollout, **fields)


def _turn_from_json(record: Mapping[str, Any]) -> Turn:
    spans = [(version, count) for version, count in record.get("versions", ())]
    return Turn(**{**record, "versions": spans})
