"""Hands the outcomes of a collection on while it goes on, so that they can be kept before its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from gymexp.errors import ServiceError
from gymexp.rollout.attempts import Attempted
from gymexp.rollout.outcome import Outcome

AT_ONCE = 32
EVERY_S = 5.0

Keep = Callable[[Sequence[tuple[int, Outcome]]], None]


class Landing:
    """The landed outcomes of a collection. They are completed and kept in batches: as soon as AT_ONCE have
    landed since the last batch, and at least every EVERY_S seconds.

    rollouts: the collection's tasks, by index. complete: returns the outcomes with what the gateway knows of
    their attempts. keep: gets each batch.
    """

    def __init__(
        self,
        rollouts: Sequence[asyncio.Task[Attempted]],
        complete: Callable[[Sequence[Attempted]], Awaitable[list[Outcome]]],
        keep: Keep,
    ) -> None:
        self._complete = complete
        self._keep = keep
        self._landed: dict[int, Attempted] = {}  # not kept yet
        self._kept: dict[int, Outcome] = {}
        self._full = asyncio.Event()
        self._ending = False
        for index, rollout in enumerate(rollouts):
            rollout.add_done_callback(lambda done, index=index: self._land(index, done))
        self._keeping = asyncio.create_task(self._keep_regularly())

    def _land(self, index: int, rollout: asyncio.Task[Attempted]) -> None:
        if rollout.cancelled() or rollout.exception():
            return
        self._landed[index] = rollout.result()
        if len(self._landed) >= AT_ONCE:
            self._full.set()

    async def _keep_regularly(self) -> None:
        while not self._ending:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await self._full.wait()
            self._full.clear()
            await self._flush()

    async def _flush(self) -> None:
        batch = dict(self._landed)
        if batch:
            completed = await self._complete(list(batch.values()))
            self._hand_on(batch, completed)

    def _hand_on(self, batch: dict[int, Attempted], outcomes: Sequence[Outcome]) -> None:
        """Keeps a batch. It stays among the landed ones if `keep` raises."""
        pairs = list(zip(batch, outcomes, strict=True))
        self._keep(pairs)
        self._kept.update(pairs)
        for index in batch:
            del self._landed[index]

    async def all(self) -> list[Outcome]:
        """Keeps what has landed since the last batch, and returns all outcomes in order. Raises what
        `complete` or `keep` raised.
        """
        await self._end()
        await self._flush()
        return [self._kept[index] for index in sorted(self._kept)]

    async def close(self) -> None:
        """Keeps what has landed, as it is if the gateway is gone."""
        with contextlib.suppress(Exception):  # the collection raises it, or ended for another reason
            await self._end()
        try:
            await self._flush()
        except ServiceError:
            batch = dict(self._landed)
            self._hand_on(batch, [played.outcome for played in batch.values()])

    async def _end(self) -> None:
        """Ends the regular batches. Raises the error that ended them before."""
        self._ending = True
        self._full.set()
        await self._keeping
