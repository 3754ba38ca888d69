"""Which groups of rollouts are played ahead of training, and which that have landed make a batch. Pure.

A group is all rollouts of one task at one place in the run's order of tasks, and its serial is that place.
The order never ends, and no place is trained twice. A batch is trained in one optimizer step, so the number
of batches trained is also the version of the weights. No group is thrown away for being old: none is started
that could become older than `max_staleness`, and training waits for a group that is about to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, Literal

Order = Literal["exact", "finished"]


class GroupSchedule:
    """Follows each group from its start to the batch that trains it.

    The staleness of a group is the number of versions between its start and its training. In training version
    v, at most `lead` batches beyond batch v are played; groups that take longer than `lead` steps do not
    count, up to `max_staleness` batches in all.

    order=exact: batches are the groups in serial order; `lead` equals `max_staleness`. order=finished: a
    batch is the oldest of the groups that have landed. It is taken once all other groups can still be trained
    in time, at `groups_per_batch` a step; so a group that reaches `max_staleness` is waited for.
    """

    def __init__(
        self, groups_per_batch: int, lead: int, max_staleness: int, order: Order, num_batches: int
    ) -> None:
        """num_batches: of the whole run, those before a resume included."""
        assert 0 <= lead <= max_staleness and (order == "finished" or lead == max_staleness)
        self._size = groups_per_batch
        self._lead = lead
        self._max_staleness = max_staleness
        self._order = order
        self._num_batches = num_batches
        self._version = 0
        self._has_taken = False  # the batch of this version
        self._low = 0  # every serial below it is done: trained, or left out
        self._done: set[int] = set()  # the serials above it that are done
        self._starts: dict[int, int] = {}  # of the groups that are neither trained nor left out: the version
        self._landed: set[int] = set()  # of these

    @property
    def version(self) -> int:
        return self._version

    @property
    def has_taken(self) -> bool:
        """Whether the batch of this version was taken."""
        return self._has_taken

    @property
    def num_landed(self) -> int:
        """The number of groups that have landed and wait for their batch."""
        return len(self._landed)

    @property
    def num_in_flight(self) -> int:
        """The number of groups that were started and have not landed."""
        return len(self._starts) - len(self._landed)

    def advance(self, version: int) -> None:
        """Goes on to a version of the weights, after the batch of the version before was trained."""
        assert version == self._version + self._has_taken, (version, self._version, self._has_taken)
        self._version, self._has_taken = version, False

    def to_start(self) -> list[int]:
        """Returns the serials of the groups that must be started now; each is returned once."""
        late = sum(self._version - start > self._lead for start in self._starts.values())
        ahead = 1 + self._lead - self._has_taken
        room = ahead * self._size + min(late, (self._max_staleness - self._lead) * self._size)
        still_trained = (self._num_batches - self._version - self._has_taken) * self._size
        known = self._done | self._starts.keys()
        unseen = (serial for serial in count(self._low) if serial not in known)
        number = min(room, still_trained) - len(self._starts)
        serials = [serial for _, serial in zip(range(number), unseen, strict=False)]
        self._starts |= dict.fromkeys(serials, self._version)
        return serials

    def landed(self, serial: int, is_kept: bool) -> None:
        """Notes that a group has landed. is_kept: False leaves it out of training, and frees its place."""
        assert serial in self._starts and serial not in self._landed, serial
        if is_kept:
            self._landed.add(serial)
        else:
            self._close([serial])

    def take(self) -> list[int] | None:
        """Returns the serials of this version's batch, oldest first; None if a group must still land."""
        assert not self._has_taken
        outstanding = sorted(self._starts)  # the oldest first, as groups are started in order
        ready = [serial for serial in outstanding if serial in self._landed]
        batch = ready[: self._size]
        if len(batch) < self._size:
            return None
        if self._order == "exact":
            if batch != outstanding[: self._size]:
                return None
        elif not self._leaves_time(set(batch)):
            return None
        self._has_taken = True
        self._close(batch)
        return batch

    def num_overtaken(self, batch: Sequence[int]) -> int:
        """Returns how many groups of a batch that was taken are younger than one that is outstanding."""
        oldest = min(self._starts, default=None)
        return 0 if oldest is None else sum(serial > oldest for serial in batch)

    def state(self) -> dict[str, Any]:
        """Returns which groups are done, for a checkpoint: all serials below `low`, and the runs of serials
        in `above`, each as its first one and its length. The others will be played again."""
        above: list[list[int]] = []
        for serial in sorted(self._done):
            if above and serial == sum(above[-1]):
                above[-1][1] += 1
            else:
                above.append([serial, 1])
        return {"low": self._low, "above": above}

    def restore(self, state: Mapping[str, Any], version: int) -> None:
        """Begins from what `state` returned, with nothing started. version: of the weights, so the number of
        batches trained."""
        self._version, self._has_taken = version, False
        self._low = state["low"]
        self._done = {serial for first, length in state["above"] for serial in range(first, first + length)}
        self._starts, self._landed = {}, set()

    def _leaves_time(self, batch: set[int]) -> bool:
        """Returns whether all groups outside the batch can be trained before they are too old."""
        left = [start for serial, start in self._starts.items() if serial not in batch]
        return all(
            sum(start + self._max_staleness <= self._version + steps for start in left) <= steps * self._size
            for steps in range(self._max_staleness)  # after more steps there is time for all
        )

    def _close(self, serials: Sequence[int]) -> None:
        for serial in serials:
            del self._starts[serial]
            self._landed.discard(serial)
            self._done.add(serial)
        while self._low in self._done:
            self._done.discard(self._low)
            self._low += 1
