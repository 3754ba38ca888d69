"""What a gateway knows about each attempt at a rollout: which weights sampled it, its seconds, its usage.

The gateway that served the attempt keeps this knowledge by the attempt's name, because NeMo Gym's agents do
not pass it on. Within an attempt it keeps the versions of the weights by the ids of each turn, as an agent
may leave some of the policy's replies out of the episode, or show them in another order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import orjson

from gymexp.errors import ServiceError
from gymexp.processes.access_keys import RUN, header_of
from gymexp.rollout.outcome import Failed, Outcome, Span, Turn
from gymexp.rollout.tokens import ids_digest

_TIMEOUT_S = 60.0
_CAPACITY = 1 << 18


@dataclass
class Attempt:
    """seconds: the time that the policy's turns took, the wait for an engine included. usage: as in
    `outcome.Rollout`, of a policy that gives no token ids; else None. versions: by `turn_key`, which weights
    sampled a turn (`outcome.Turn`); turns whose versions are unknown are left out. num_turns: with those.
    """

    seconds: float = 0.0
    usage: dict[str, int] | None = None
    versions: dict[str, list[Span]] = field(default_factory=dict)
    num_turns: int = 0

    def add_usage(self, usage: dict[str, int] | None) -> None:
        if usage is None or self.usage is None:
            self.usage = usage
            return
        # A turn may lack a count, and then so does the sum.
        self.usage = {name: self.usage[name] + usage[name] for name in self.usage.keys() & usage.keys()}

    def add_versions(self, key: str, versions: list[Span]) -> None:
        """Adds the versions of a turn. Of two turns with the same ids, which nothing tells apart, the older
        versions count."""
        self.versions[key] = min(versions, self.versions.get(key, versions))


class Attempts:
    """The newest attempts, in the gateway's memory. An attempt that is forgotten has unknown weights.

    capacity: the number of turns that all remembered attempts may have together.
    """

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._capacity = capacity
        self._num_turns = 0
        self._by_name: OrderedDict[str, Attempt] = OrderedDict()

    def add_turn(
        self,
        name: str,
        seconds: float,
        key: str = "",
        versions: list[Span] | None = None,
        usage: dict[str, int] | None = None,
    ) -> None:
        """Adds one turn to the attempt of this name. key, versions: of the turn, if its versions are known.
        usage: of the turn, if the policy gives no token ids."""
        attempt = self._by_name.setdefault(name, Attempt())
        self._by_name.move_to_end(name)
        attempt.seconds += seconds
        attempt.num_turns += 1
        attempt.add_usage(usage)
        if versions is not None:
            attempt.add_versions(key, versions)
        self._num_turns += 1
        while self._num_turns > self._capacity and len(self._by_name) > 1:
            self._num_turns -= self._by_name.popitem(last=False)[1].num_turns

    def answer(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns the JSON answer of `POST /attempts`; null for an attempt that is not known."""
        known = [self._by_name.get(name) for name in names]
        return {
            "attempts": [
                one and {"seconds": one.seconds, "usage": one.usage, "versions": one.versions}
                for one in known
            ]
        }


def turn_key(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
    """Returns the key of a turn in the versions of its attempt."""
    return ids_digest(prompt_ids, completion_ids).hex()


@dataclass(frozen=True)
class Attempted:
    """An outcome, the name of its last attempt, and the URL of the gateway that served this attempt; None if
    nothing knows of attempts."""

    outcome: Outcome
    attempt: str
    gateway_url: str | None


async def with_attempts(played: Sequence[Attempted], http: aiohttp.ClientSession) -> list[Outcome]:
    """Returns the outcomes with the weights that sampled them and the policy's seconds, as far as a gateway
    knows them. Raises ServiceError if a gateway does not answer.
    """
    places: dict[str, list[int]] = {}
    for place, one in enumerate(played):
        if one.gateway_url is not None:
            places.setdefault(one.gateway_url, []).append(place)
    outcomes = [one.outcome for one in played]
    for url, own in places.items():
        completed = await _ask(url, [played[place] for place in own], http)
        for place, outcome in zip(own, completed, strict=True):
            outcomes[place] = outcome
    return outcomes


async def _ask(gateway_url: str, played: Sequence[Attempted], http: aiohttp.ClientSession) -> list[Outcome]:
    try:
        async with http.post(
            f"{gateway_url}/attempts",
            json={"plays": [one.attempt for one in played]},
            headers=header_of(RUN),
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        ) as response:
            attempts = orjson.loads(await response.read())["attempts"]
        pairs = zip(played, attempts, strict=True)
        return [_with_attempt(one.outcome, attempt) for one, attempt in pairs]
    except (aiohttp.ClientError, TimeoutError, KeyError, TypeError, ValueError) as error:
        raise ServiceError(f"the gateway did not say which weights sampled: {error!r}") from None


def knows_versions(outcome: Outcome) -> bool:
    """Returns whether it is known which weights sampled each turn of the outcome. It is not known after a
    restart of the gateway, which loses what it knew of the turns before."""
    return isinstance(outcome, Failed) or all(turn.versions for turn in outcome.rollout.turns)


def _with_attempt(outcome: Outcome, attempt: dict[str, Any] | None) -> Outcome:
    """Returns the outcome with what its attempt says. attempt: an element of the answer of `/attempts`."""
    if attempt is None or isinstance(outcome, Failed):
        return outcome
    rollout, versions = outcome.rollout, attempt["versions"]
    rollout = replace(rollout, seconds=rollout.seconds | {"policy": round(attempt["seconds"], 4)})
    if attempt["usage"] is not None:
        rollout = replace(rollout, usage=attempt["usage"])
    turns = [_with_versions(turn, versions) for turn in rollout.turns]
    outcome = replace(outcome, rollout=replace(rollout, turns=turns))
    if not turns or not knows_versions(outcome):
        return outcome
    oldest = min(version for turn in turns for version, _ in turn.versions)
    return replace(outcome, rollout=replace(outcome.rollout, weights_version=oldest))


def _with_versions(turn: Turn, versions: dict[str, list[list[int]]]) -> Turn:
    if not versions:
        return turn
    spans = versions.get(turn_key(turn.prompt_ids, turn.completion_ids), ())
    return replace(turn, versions=[(version, count) for version, count in spans])
