"""A few rollouts of a batch as a tracker shows them: the ones to look at first, as conversations. Pure."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from gymexp.rollout.items import text_of
from gymexp.rollout.outcome import Failed, Outcome, Truncated, task_of


@dataclass(frozen=True)
class Chosen:
    """An outcome to show. why: it was chosen. advantage: what training gave it; None if it failed, and for a
    held-out one."""

    why: str
    outcome: Outcome
    advantage: float | None = None


def choose(
    outcomes: Sequence[Outcome], limit: int, seed: str, advantages: Sequence[float | None] | None = None
) -> list[Chosen]:
    """Returns at most `limit` outcomes: of each environment in turn the best, the worst and a failed one,
    then random ones. The same seed chooses the same. advantages: of the outcomes; None for held-out ones."""
    by_env: dict[str, list[int]] = {}
    for number, outcome in enumerate(outcomes):
        by_env.setdefault(task_of(outcome).env, []).append(number)
    columns = [
        _in_order(outcomes, of_env, random.Random(f"{seed} {env}")) for env, of_env in sorted(by_env.items())
    ]
    found = [found for found in chain(*zip_longest(*columns)) if found][:limit]
    return [Chosen(why, outcomes[n], advantages[n] if advantages else None) for why, n in found]


def _in_order(
    outcomes: Sequence[Outcome], numbers: Sequence[int], draw: random.Random
) -> Iterator[tuple[str, int]]:
    """Yields the numbers of outcomes, the first to look at first, each with why it was chosen."""
    rewards = {n: of.rollout.reward for n in numbers if not isinstance(of := outcomes[n], Failed)}
    left = list(numbers)

    def take(why: str, number: int) -> tuple[str, int]:
        left.remove(number)
        return why, number

    if rewards:
        yield take("best", max(rewards, key=rewards.__getitem__))
        if len(rewards) > 1:
            # Not the best again, where all rewards are equal.
            yield take("worst", min((n for n in left if n in rewards), key=rewards.__getitem__))
    if failed := [n for n in numbers if n not in rewards]:
        yield take("failed", draw.choice(failed))
    draw.shuffle(left)
    yield from (("random", number) for number in left)


def facts(chosen: Chosen) -> dict[str, Any]:
    """Returns what a tracker shows beside the conversation. reward, turns and tokens are None for a failed
    rollout."""
    outcome, task = chosen.outcome, task_of(chosen.outcome)
    shown: dict[str, Any] = {"env": task.env, "task": task.key, "chosen": chosen.why}
    shown |= dict.fromkeys(("reward", "turns", "tokens"))
    if isinstance(outcome, Failed):
        return shown | {"outcome": f"failed ({outcome.cause})"}
    rollout = outcome.rollout
    end = f"truncated ({outcome.limit})" if isinstance(outcome, Truncated) else "completed"
    shown |= {"reward": rollout.reward, "turns": len(rollout.turns)}
    shown["tokens"] = sum(len(turn.completion_ids) for turn in rollout.turns)
    return shown | {"outcome": "refused" if rollout.refused else end}


def messages(outcome: Outcome) -> list[dict[str, str]]:
    """Returns the conversation, prompt included, as messages `{"role", "content"}`. That of a failed rollout
    is its prompt, then its error."""
    asked = task_of(outcome).row.get("responses_create_params", {}).get("input", [])
    items: list[Mapping[str, Any]] = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if isinstance(outcome, Failed):
        items = [*items, {"role": "error", "content": outcome.detail}]
    else:
        items = [*items, *outcome.rollout.items]
    return [_message(item) for item in items]


def as_text(conversation: Sequence[Mapping[str, str]]) -> str:
    """Returns messages as one text, as a cell of a table shows them."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in conversation)


def _message(item: Mapping[str, Any]) -> dict[str, str]:
    """Returns an item of OpenAI's Responses API as a message of its Chat Completions API."""
    match item.get("type", "message"):
        case "message":
            return {"role": str(item.get("role") or "assistant"), "content": text_of(item.get("content"))}
        case "function_call":
            return {"role": "assistant", "content": f"{item.get('name')}({item.get('arguments', '')})"}
        case "function_call_output":
            return {"role": "tool", "content": text_of(item.get("output"))}
        case "reasoning":
            return {"role": "assistant", "content": text_of(item.get("summary") or item.get("content"))}
        case _:
            return {"role": "assistant", "content": json.dumps(item)}
