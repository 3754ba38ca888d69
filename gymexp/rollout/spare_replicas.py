"""The replicas of environments with `replicas=auto`: how many there are follows the slowest environment.

The rule is a measured climb. After a collection the environment that ended last gets twice as many replicas.
If it does not play at least a tenth faster in its next collection, its servers are not what it waits for (but
the policy is, or a core): it goes back, and is left alone for a number of collections that doubles each time.
All such replicas together are at most as many as there are cores. If all are in use, an environment that
would still end early with one less gives one to the slowest.

Rewards do not depend on replicas, and counts change between two collections, when no rollout is in flight.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import aiohttp

from gymexp.processes.access_keys import RUN, header_of
from gymexp.record.services_file import Replica
from gymexp.rollout.outcome import Failed, Outcome, Rollout, task_of

log = logging.getLogger(__name__)
_GAIN = 1.1  # by which an environment must play faster with more replicas to keep them
_FIRST_PAUSE = 8  # collections
_EARLY = 0.8  # of the slowest environment's seconds
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Pace:
    """What an environment did in a collection. seconds: until its last rollout ended. replicas: those that
    played."""

    rollouts: int
    seconds: float
    replicas: int

    @property
    def per_second(self) -> float:
        return self.rollouts / self.seconds


@dataclass(frozen=True)
class _Trial:
    env: str
    before: int  # replicas
    pace: Pace


class ReplicaCounts:
    """Decides the number of replicas of each environment with replicas=auto. Pure.

    most: the largest number by environment; the largest of all is also the largest sum.
    """

    def __init__(self, most: Mapping[str, int]) -> None:
        self._most = dict(most)
        self._total = max([len(most), *most.values()])
        self.counts = dict.fromkeys(most, 1)
        self._trial: _Trial | None = None
        self._pauses: dict[str, int] = {}  # collections until an environment may grow again
        self._next_pause = dict.fromkeys(most, _FIRST_PAUSE)

    def after(self, paces: Mapping[str, Pace]) -> dict[str, int]:
        """Returns the counts for the next collection. paces: of all environments of the last one."""
        self._pauses = {env: left - 1 for env, left in self._pauses.items() if left > 1}
        self._judge(paces)
        slowest = max(paces, key=lambda env: paces[env].seconds, default="")
        if self._trial is None and slowest in self.counts and slowest not in self._pauses:
            self._grow(slowest, paces)
        return dict(self.counts)

    def taken_back(self, env: str, count: int) -> None:
        """Notes that an environment has only `count` replicas, as there is no memory for more."""
        self.counts[env], self._trial = count, None
        self._pause(env)

    def _judge(self, paces: Mapping[str, Pace]) -> None:
        trial = self._trial
        if trial is None or trial.env not in paces:
            return
        pace = paces[trial.env]
        if pace.replicas < min(pace.rollouts, self.counts[trial.env]):
            return  # some were still starting
        self._trial = None
        if pace.per_second < _GAIN * trial.pace.per_second:
            self.counts[trial.env] = min(self.counts[trial.env], trial.before)
            self._pause(trial.env)

    def _pause(self, env: str) -> None:
        self._pauses[env] = self._next_pause[env]
        self._next_pause[env] *= 2

    def _grow(self, env: str, paces: Mapping[str, Pace]) -> None:
        count = self.counts[env]
        if count < self._most[env] and sum(self.counts.values()) >= self._total:
            self._take_one(env, paces)
        free = self._total - sum(self.counts.values())
        more = min(count, free, self._most[env] - count)
        if more > 0:
            self.counts[env] += more
            self._trial = _Trial(env, count, paces[env])

    def _take_one(self, env: str, paces: Mapping[str, Pace]) -> None:
        """Takes a replica from the environment that ends first, if it would still end early."""
        with_less = {
            other: paces[other].seconds * count / (count - 1)
            for other, count in self.counts.items()
            if other != env and count > 1 and other in paces
        }
        giver = min(with_less, key=lambda other: with_less[other], default=None)
        if giver is not None and with_less[giver] < _EARLY * paces[env].seconds:
            self.counts[giver] -= 1


def paces_of(outcomes: Sequence[Outcome]) -> dict[str, Pace]:
    """Returns the pace of each environment in a collection, from the rollouts that did not fail."""
    by_env: dict[str, list[Rollout]] = defaultdict(list)
    for outcome in outcomes:
        if not isinstance(outcome, Failed):
            by_env[task_of(outcome).env].append(outcome.rollout)
    paces = {}
    for env, rollouts in by_env.items():
        began = min(r.began - r.seconds.get("queue", 0.0) for r in rollouts)
        ended = max(r.began + r.seconds.get("total", 0.0) for r in rollouts)
        if ended > began:
            paces[env] = Pace(len(rollouts), ended - began, len({r.replica for r in rollouts}))
    return paces


class Seat(Protocol):
    """A replica, and whether rollouts may use it. A spare one is asleep at first."""

    replica: Replica
    awake: bool


class SpareReplicas:
    """Wakes and rests the spare replicas of a collector's seats through the controller."""

    def __init__(
        self, seats: Mapping[str, Sequence[Seat]], http: aiohttp.ClientSession, control_url: str | None
    ) -> None:
        self._seats = {env: own for env, own in seats.items() if any(seat.replica.spare for seat in own)}
        self._http = http
        self._control_url = control_url
        self._counts = ReplicaCounts({env: len(own) for env, own in self._seats.items()})

    async def follow(self, outcomes: Sequence[Outcome]) -> None:
        """Changes the numbers of replicas after a collection. If the controller is gone, the collector's
        watch notices it."""
        if not self._seats:
            return
        paces = paces_of(outcomes)
        wanted = self._counts.after(paces)
        now = {env: sum(seat.awake for seat in own) for env, own in self._seats.items()}
        # Those that rest go first, so that the others have their memory.
        for env, count in sorted(wanted.items(), key=lambda item: item[1] - now[item[0]]):
            if count != now[env]:
                await self._change(env, now[env], count, paces.get(env))

    async def _change(self, env: str, now: int, count: int, pace: Pace | None) -> None:
        seats = self._seats[env]
        for seat in seats[count:now]:
            seat.awake = False
            await self._ask("rest", names=seat.replica.services)
        for index, seat in enumerate(seats[now:count], now):
            twins = [name for name in seats[0].replica.services if name not in seat.replica.services]
            if not await self._ask("wake", names=seat.replica.services, twins=twins):
                log.info("env.%s stays at %d replicas: too little memory is free for more", env, index)
                self._counts.taken_back(env, index)
                return
            seat.awake = True
        measured = f" ({pace.rollouts} rollouts in {pace.seconds:.1f} s)" if pace else ""
        log.info("env.%s has %d replicas from now on, %d before%s", env, count, now, measured)

    async def _ask(self, what: str, **body: Sequence[str]) -> bool:
        """Returns whether the controller did it."""
        patience, url = aiohttp.ClientTimeout(total=_PATIENCE_S), f"{self._control_url}/{what}"
        try:
            async with self._http.post(url, json=body, headers=header_of(RUN), timeout=patience) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False
