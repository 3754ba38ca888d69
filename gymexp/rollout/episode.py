"""NeMo Gym 0.7's typed episodes, and how an agent or an environment server says that an episode failed.

Sources in NeMo Gym 0.7: nemo_gym/episode_types.py, failure_kinds.py, task_materialization.py, and
`BaseVerifyResponse.mask_sample` in base_resources_server.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gymexp.rollout.outcome import Cause, Task

# Of NeMo Gym's 22 kinds of failure, and of the classes that its agents used before these, those that say that
# time ran out. Any other kind is the environment's failure: none is a reward.
_TIMEOUTS = frozenset(("transport_timeout", "agent_timeout", "timeout_exceeded"))
_ROUTING = frozenset(("agent_ref", "task_source", "skills_ref"))


@dataclass(frozen=True)
class EpisodeFailure:
    """What an answer to `/run` says instead of a reward. terminal: another attempt is of no use."""

    cause: Cause
    detail: str
    terminal: bool = False


def typed_request(task: Task, row: Mapping[str, Any], attempt: str) -> dict[str, Any]:
    """Returns the request for an episode of the task. row: the task's row, with sampling parameters. attempt:
    the name of the attempt, of letters and digits."""
    task_input = {k: v for k, v in row.items() if k not in _ROUTING and not k.startswith("_ng_")}
    return {
        "episode_id": {"rollout_id": attempt or "attempt", "attempt": 0},
        "task": {"task_id": {"taskset": task.env, "task_id": task.key}, "task_input": task_input},
    }


def result_of(reply: Any) -> Any:
    """Returns the result of a typed episode; any other reply as it is."""
    is_typed = isinstance(reply, dict) and "episode_id" in reply and isinstance(reply.get("result"), dict)
    return reply["result"] if is_typed else reply


def failure_in(reply: Any) -> EpisodeFailure | None:
    """Returns the failure that an answer to `/run` reports; None if it has a valid reward.

    A sample with `mask_sample` has a reward that NeMo Gym calls no measurement of the policy, e.g. as the
    judge could not be reached. It is a failure: no token of it trains, and no score counts it.
    """
    if not isinstance(reply, dict):
        return None
    if "episode_id" in reply and isinstance(failure := reply.get("failure"), dict):
        where = f"{failure['stage']}: " if failure.get("stage") else ""
        return _failure(
            failure.get("failure_kind"), where + str(failure.get("failure_reason")), failure.get("terminal")
        )
    if kind := reply.get("_ng_failure_class"):
        message = reply.get("_ng_failure_message") or reply.get("failure_reason") or reply.get("error")
        return _failure(reply.get("failure_kind") or kind, str(message), reply.get("_ng_failure_terminal"))
    settings = reply.get("instance_config")  # where agents had it before it became a field of its own
    is_masked = reply.get("mask_sample") or (isinstance(settings, dict) and settings.get("mask_sample"))
    if is_masked:
        reason = reply.get("failure_reason") or "the environment says that the reward is no measurement"
        return _failure(reply.get("failure_kind"), f"mask_sample: {reason}", False)
    return None


def _failure(kind: Any, reason: str, terminal: Any) -> EpisodeFailure:
    detail = f"{kind}: {reason}" if kind else reason
    return EpisodeFailure("timeout" if kind in _TIMEOUTS else "environment", detail[:2000], bool(terminal))
