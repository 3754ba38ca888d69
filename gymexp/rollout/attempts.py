"""What the gateway knows about each attempt at a rollout: which weights sampled it, its seconds, its usage.

The gateway keeps this knowledge by the attempt's name, because NeMo Gym's agents do not pass it on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import aiohttp
import orjson

from gymexp.errors import ServiceError
from gymexp.processes.access_keys import RUN, header_of
from gymexp.rollout.outcome import Failed, Outcome

_TIMEOUT_S = 60.0
_CAPACITY = 65536


@dataclass(frozen=True)
class Attempt:
    """versions: the oldest and the newest version of the weights that sampled the attempt, in optimizer
    steps; None if the engine does not say. seconds: the time that the policy's turns took, the wait for an
    engine included. usage: as in `outcome.Rollout`, of a policy that gives no token ids; else None.
    """

    versions: tuple[int, int] | None
    seconds: float
    usage: dict[str, int] | None = None

    def and_turn(
        self, versions: tuple[int, int] | None, seconds: float, usage: dict[str, int] | None
    ) -> Attempt:
        """Returns the attempt with one more turn."""
        known = [*(self.versions or ()), *(versions or ())]
        total = usage
        if usage is not None and self.usage is not None:  # a turn may lack a count, and then so does the sum
            total = {name: self.usage[name] + usage[name] for name in self.usage.keys() & usage.keys()}
        return Attempt((min(known), max(known)) if known else None, self.seconds + seconds, total)


class Attempts:
    """The newest attempts, in the gateway's memory. An attempt that is forgotten has unknown weights."""

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._capacity = capacity
        self._by_name: OrderedDict[str, Attempt] = OrderedDict()

    def add_turn(
        self,
        name: str,
        versions: tuple[int, int] | None,
        seconds: float,
        usage: dict[str, int] | None = None,
    ) -> None:
        """Adds one turn to the attempt of this name. usage: of the turn, if the policy gives no token ids."""
        earlier = self._by_name.pop(name, Attempt(None, 0.0))
        self._by_name[name] = earlier.and_turn(versions, seconds, usage)
        if len(self._by_name) > self._capacity:
            self._by_name.popitem(last=False)

    def answer(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns the JSON answer of `POST /attempts`; null for an attempt that is not known."""
        known = [self._by_name.get(name) for name in names]
        return {"attempts": [attempt and asdict(attempt) for attempt in known]}


async def with_attempts(
    outcomes: Sequence[Outcome], names: Sequence[str], gateway_url: str, http: aiohttp.ClientSession
) -> list[Outcome]:
    """Returns the outcomes with the weights that sampled them and the policy's seconds.

    names: of each outcome's last attempt. Raises ServiceError if the gateway does not answer, or if weights
    of two versions sampled a rollout.
    """
    try:
        async with http.post(
            f"{gateway_url}/attempts",
            json={"plays": list(names)},
            headers=header_of(RUN),
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        ) as response:
            fields = orjson.loads(await response.read())["attempts"]
        attempts = [one and Attempt(**one) for one in fields]
        return [_with_attempt(*pair) for pair in zip(outcomes, attempts, strict=True)]
    except (aiohttp.ClientError, TimeoutError, KeyError, TypeError, ValueError) as error:
        raise ServiceError(f"the gateway did not say which weights sampled: {error!r}") from None


def _with_attempt(outcome: Outcome, attempt: Attempt | None) -> Outcome:
    if attempt is None or isinstance(outcome, Failed):
        return outcome
    rollout = replace(
        outcome.rollout, seconds=outcome.rollout.seconds | {"policy": round(attempt.seconds, 4)}
    )
    if attempt.usage is not None:
        rollout = replace(rollout, usage=attempt.usage)
    if attempt.versions is None:
        return replace(outcome, rollout=rollout)
    oldest, newest = attempt.versions
    if oldest != newest:
        raise ServiceError(
            f"{rollout.task.key} was sampled with the weights of step {oldest} and those of {newest}"
        )
    return replace(outcome, rollout=replace(rollout, weights_version=newest))
