"""The groups of rollouts between the collector, which plays them, and the trainer, which takes batches.

Two threads use the queue: the trainer's, which goes on from step to step, and the collector's, in which
groups land, and others take the place of those that are left out.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from gymexp.config.schema import RolloutConfig
from gymexp.errors import RolloutError
from gymexp.rollout.ahead import Landed
from gymexp.rollout.failed_share import check_failed_share
from gymexp.rollout.group_schedule import GroupSchedule
from gymexp.rollout.outcome import Failed, Outcome, task_of

_MEANWHILE_S = 1.0

Group = list[Outcome]
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """What a step trains, the oldest group first.

    left_out: groups of equal rewards that have landed since the batch before. num_landed, num_in_flight: of
    the other groups at that moment. num_overtaken: groups of the batch that are younger than one of these.
    """

    serials: list[int]
    groups: list[Group]
    left_out: list[Group]
    num_landed: int
    num_in_flight: int
    num_overtaken: int

    @property
    def trained(self) -> list[Outcome]:
        """The rollouts that the step trains, group after group."""
        return [outcome for group in self.groups for outcome in group]

    @property
    def outcomes(self) -> list[Outcome]:
        """The rollouts that the step trains, and then those of the groups left out."""
        return [*self.trained, *(outcome for group in self.left_out for outcome in group)]


class GroupQueue:
    """Starts the groups that the schedule names, and hands out its batches.

    play: begins to play the group of a serial; its second argument gets the outcomes or an error, in any
    thread. forget: gets the number of rollouts that have left the queue. rollout: says whether groups of
    equal rewards are left out, and how many may be in a row.
    """

    def __init__(
        self,
        schedule: GroupSchedule,
        groups_per_batch: int,
        rollout: RolloutConfig,
        play: Callable[[int, Landed], None],
        forget: Callable[[int], None],
    ) -> None:
        self._schedule = schedule
        self._size = groups_per_batch
        self._rollout = rollout
        self._play = play
        self._forget = forget
        self._changed = threading.Condition()
        self._landed: dict[int, Group] = {}
        self._left_out: list[Group] = []  # since the last batch
        self._error: BaseException | None = None
        self._is_held = False
        self._before = schedule.state()  # as it was before the batch of this version was taken

    def advance(self, version: int) -> None:
        """Goes on to a version of the weights, with which the groups are sampled that are started from now
        on."""
        with self._changed:
            self._schedule.advance(version)
            self._start()

    def take(self, meanwhile: Callable[[], None]) -> Batch:
        """Waits for the batch of this version, and returns it.

        meanwhile: called about once a second in the caller's thread. Raises what ended a group, in this and
        every later call, and RolloutError if too many groups in a row are left out.
        """
        return self._await(self._batch, meanwhile)

    def landed(self, is_wanted: Callable[[Group], bool], meanwhile: Callable[[], None]) -> list[Group]:
        """Waits until a group that is wanted has landed, or none is in flight. Returns the groups that have
        landed and are in no batch yet, the oldest first.

        meanwhile: as for `take`. What ends a group ends the wait too, and is raised by the next `take`.
        """

        def look() -> list[Group] | None:
            groups = [self._landed[serial] for serial in sorted(self._landed)]
            may_land = self._schedule.num_in_flight and self._error is None
            return None if may_land and not any(map(is_wanted, groups)) else groups

        return self._await(look, meanwhile)

    def _await(self, look: Callable[[], T | None], meanwhile: Callable[[], None]) -> T:
        """Returns what `look` does once that is not None. Calls `meanwhile` about once a second."""
        next_call = time.monotonic() + _MEANWHILE_S
        while True:
            with self._changed:
                if (found := look()) is not None:
                    return found
                self._changed.wait(max(0.0, next_call - time.monotonic()))
            if time.monotonic() >= next_call:
                meanwhile()
                next_call = time.monotonic() + _MEANWHILE_S

    def hold(self) -> None:
        """Starts no group until `release`. Those in flight go on."""
        with self._changed:
            self._is_held = True

    def release(self) -> None:
        """Starts the groups that are due, and from now on each at its time."""
        with self._changed:
            self._is_held = False
            self._start()

    @property
    def left_out(self) -> list[Group]:
        """The groups that were left out since the last batch."""
        with self._changed:
            return list(self._left_out)

    def state(self, num_steps: int) -> dict[str, Any]:
        """Returns which groups the first `num_steps` steps have trained or left out, for a checkpoint."""
        with self._changed:
            is_begun = self._schedule.version == num_steps and self._schedule.has_taken
            return self._before if is_begun else self._schedule.state()

    def _batch(self) -> Batch | None:
        if self._error is not None:
            raise self._error
        before = self._schedule.state()
        if (serials := self._schedule.take()) is None:
            return None
        self._before = before
        groups = [self._landed.pop(serial) for serial in serials]
        left_out, self._left_out = self._left_out, []
        self._forget(sum(map(len, groups)))
        self._start()
        schedule = self._schedule
        waiting = schedule.num_landed, schedule.num_in_flight
        return Batch(serials, groups, left_out, *waiting, schedule.num_overtaken(serials))

    def _start(self) -> None:
        if self._is_held or self._error is not None:
            return
        for serial in self._schedule.to_start():
            self._play(serial, lambda result, serial=serial: self._land(serial, result))

    def _land(self, serial: int, result: list[Outcome] | BaseException) -> None:
        with self._changed:
            try:
                self._take_in(serial, result)
            except Exception as error:  # nobody sees it in the collector's thread, so `take` raises it
                self._error = self._error or error
            self._changed.notify_all()

    def _take_in(self, serial: int, result: list[Outcome] | BaseException) -> None:
        if isinstance(result, BaseException):
            self._error = self._error or result
            return
        is_kept = not self._rollout.dynamic_sampling or rewards_differ(result)
        self._schedule.landed(serial, is_kept)
        if is_kept:
            self._landed[serial] = result
        else:
            self._leave_out(result)
        self._start()

    def _leave_out(self, group: Group) -> None:
        self._left_out.append(group)
        self._forget(len(group))
        if len(self._left_out) > self._rollout.max_resampled * self._size and self._error is None:
            self._error = _too_many(self._left_out, self._rollout)


def rewards_differ(group: Sequence[Outcome]) -> bool:
    """Returns whether a group has two different rewards, without which its advantages are all 0."""
    return len({one.rollout.reward for one in group if not isinstance(one, Failed)}) > 1


def _too_many(left_out: Sequence[Group], rollout: RolloutConfig) -> RolloutError:
    try:
        check_failed_share([outcome for group in left_out for outcome in group], rollout.max_failed_share)
    except RolloutError as error:
        return error
    env, count = Counter(task_of(group[0]).env for group in left_out).most_common(1)[0]
    rewards = sorted({o.rollout.reward for group in left_out for o in group if not isinstance(o, Failed)})
    shown = ", ".join(f"{reward:g}" for reward in rewards[:3]) + (", …" if len(rewards) > 3 else "")
    return RolloutError(
        f"rollout.dynamic_sampling left out {len(left_out)} groups in a row, all of equal rewards ({shown}), "
        f"more than rollout.max_resampled={rollout.max_resampled} batches; {count} of them of env.{env}: "
        "make its tasks easier or harder for this policy, or raise trainer.num_generations or "
        "rollout.max_resampled"
    )
