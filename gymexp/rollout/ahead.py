"""Plays groups of rollouts on the collector's thread, each for itself, while training goes on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from gymexp.rollout.attempts import Attempted
from gymexp.rollout.outcome import Outcome, Task
from gymexp.rollout.play import Sampling
from gymexp.rollout.progress import Progress

log = logging.getLogger(__name__)
Landed = Callable[[list[Outcome] | BaseException], None]
_PROGRESS_S = 0.5


class Ahead:
    """The groups in flight of a collector. Its public methods may be called from any thread.

    play: plays one rollout, as often as it takes. complete: returns the outcomes with what the gateway knows
    of their attempts. is_complete: says whether an outcome has what training needs. report: gets the
    progress of all groups about twice a second, once one was started.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        play: Callable[[Task, Sampling, Progress], Awaitable[Attempted]],
        complete: Callable[[Sequence[Attempted]], Awaitable[list[Outcome]]],
        is_complete: Callable[[Outcome], bool],
        report: Callable[[Progress], None],
    ) -> None:
        self._loop = loop
        self._play = play
        self._complete = complete
        self._is_complete = is_complete
        self._report = report
        self._progress = Progress(total=0, began=time.monotonic())
        self._groups: set[asyncio.Task[list[Outcome]]] = set()
        self._reporting: asyncio.Task[None] | None = None

    def start(self, tasks: Sequence[Task], samplings: Sequence[Sampling], landed: Landed) -> None:
        """Begins to play a group, and returns at once. The rollouts of an environment get its places in the
        order of the calls.

        landed: called in the collector's thread, with the outcomes in order once all have ended, or with the
        error that ended the group: Stopped, ControllerGone, or the gateway's ServiceError.
        """
        self._loop.call_soon_threadsafe(self._start, tasks, samplings, landed)

    def forget(self, num_rollouts: int) -> None:
        """Takes rollouts that have landed out of the progress."""
        self._loop.call_soon_threadsafe(self._forget, num_rollouts)

    async def close(self) -> None:
        """Ends the groups in flight, without a result."""
        tasks = [*self._groups, *([self._reporting] if self._reporting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, tasks: Sequence[Task], samplings: Sequence[Sampling], landed: Landed) -> None:
        self._progress.total += len(tasks)
        if self._reporting is None:
            self._reporting = asyncio.create_task(self._report_regularly())
        group = asyncio.create_task(self._play_group(tasks, samplings))
        self._groups.add(group)
        group.add_done_callback(lambda group: self._land(group, landed))

    def _land(self, group: asyncio.Task[list[Outcome]], landed: Landed) -> None:
        self._groups.discard(group)
        if not group.cancelled():
            landed(group.exception() or group.result())

    def _forget(self, num_rollouts: int) -> None:
        self._progress.total -= num_rollouts
        self._progress.done -= num_rollouts
        self._progress.began, self._progress.tokens = time.monotonic(), 0

    async def _play_group(self, tasks: Sequence[Task], samplings: Sequence[Sampling]) -> list[Outcome]:
        """Plays the rollouts of a group. If it is not known which weights sampled one, as the gateway was
        restarted meanwhile, plays that one again with the same draws."""
        outcomes: dict[int, Outcome] = {}
        while missing := [index for index in range(len(tasks)) if index not in outcomes]:
            played = await self._play_all([(tasks[index], samplings[index]) for index in missing])
            for index, outcome in zip(missing, played, strict=True):
                if self._is_complete(outcome):
                    outcomes[index] = outcome
                else:
                    log.info("%s is played again: which weights sampled it is not known", tasks[index].key)
                    self._progress.done -= 1
        return [outcomes[index] for index in range(len(tasks))]

    async def _play_all(self, plays: Sequence[tuple[Task, Sampling]]) -> list[Outcome]:
        rollouts = [asyncio.ensure_future(self._play(*one, self._progress)) for one in plays]
        try:
            return await self._complete(await asyncio.gather(*rollouts))
        finally:
            for rollout in rollouts:
                rollout.cancel()
            await asyncio.gather(*rollouts, return_exceptions=True)

    async def _report_regularly(self) -> None:
        while True:
            self._report(self._progress)
            await asyncio.sleep(_PROGRESS_S)
