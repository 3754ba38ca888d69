"""Outcomes are kept while a collection goes on, each once, and also those of a collection that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from gymexp.errors import ServiceError
from gymexp.rollout import landing
from gymexp.rollout.attempts import Attempted
from gymexp.rollout.landing import Landing
from gymexp.rollout.outcome import Failed, Outcome, Task

TASK = Task("e/v/0", "e", "a", {})


def outcome(number: int, detail: str = "") -> Failed:
    return Failed(TASK, "engine", f"{number}{detail}")


class Kept:
    """What was kept, in batches, and a gateway that may be gone."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, str]]] = []
        self.gone = False

    def keep(self, landed: Sequence[tuple[int, Outcome]]) -> None:
        self.batches.append([(index, one.detail) for index, one in landed if isinstance(one, Failed)])

    async def complete(self, played: Sequence[Attempted]) -> list[Outcome]:
        if self.gone:
            raise ServiceError("the gateway is gone")
        return [outcome(int(one.attempt), " complete") for one in played]


async def after(seconds: float, number: int) -> Attempted:
    await asyncio.sleep(seconds)
    return Attempted(outcome(number), str(number), None)


def land(kept: Kept, *seconds: float) -> tuple[list[asyncio.Task], Landing]:
    rollouts = [asyncio.create_task(after(s, number)) for number, s in enumerate(seconds)]
    return rollouts, Landing(rollouts, kept.complete, kept.keep)


def test_outcomes_come_back_in_order_and_complete_whatever_the_order_in_which_they_landed():
    async def run() -> None:
        kept = Kept()
        rollouts, landed = land(kept, 0.1, 0.0, 0.05)
        await asyncio.gather(*rollouts)
        assert [one.detail for one in await landed.all()] == ["0 complete", "1 complete", "2 complete"]
        assert sorted(index for batch in kept.batches for index, _ in batch) == [0, 1, 2]
        await landed.close()
        assert sum(map(len, kept.batches)) == 3

    asyncio.run(run())


def test_a_collection_ends_whose_last_batch_is_full_as_its_last_rollout_lands():
    async def run() -> None:
        rollouts, landed = land(Kept(), *[0.01] * landing.AT_ONCE)
        await asyncio.gather(*rollouts)
        done, _ = await asyncio.wait([asyncio.create_task(landed.all())], timeout=5)
        assert done and len(done.pop().result()) == landing.AT_ONCE

    asyncio.run(run())


@pytest.mark.parametrize("way", ["all", "close"])
def test_a_batch_that_is_being_completed_as_the_collection_ends_is_kept_once(monkeypatch, way):
    monkeypatch.setattr(landing, "AT_ONCE", 1)

    async def run() -> None:
        kept, asked = Kept(), asyncio.Event()

        async def slowly(played: Sequence[Attempted]) -> list[Outcome]:
            asked.set()
            await asyncio.sleep(0.1)
            return await kept.complete(played)

        landed = Landing([asyncio.create_task(after(0.0, 0))], slowly, kept.keep)
        await asked.wait()
        await getattr(landed, way)()
        assert kept.batches == [[(0, "0 complete")]]

    asyncio.run(run())


@pytest.mark.parametrize("way", ["all", "close"])
def test_what_lands_while_the_last_batch_is_being_completed_is_kept_too(monkeypatch, way):
    monkeypatch.setattr(landing, "AT_ONCE", 1)

    async def run() -> None:
        kept, second = Kept(), asyncio.Event()

        async def slowly(played: Sequence[Attempted]) -> list[Outcome]:
            second.set()
            await asyncio.sleep(0.1)
            return await kept.complete(played)

        async def later() -> Attempted:
            await second.wait()
            return await after(0.0, 1)

        rollouts = [asyncio.create_task(after(0.0, 0)), asyncio.create_task(later())]
        landed = Landing(rollouts, slowly, kept.keep)
        await asyncio.gather(*rollouts)
        assert not kept.batches
        await getattr(landed, way)()
        assert kept.batches == [[(0, "0 complete")], [(1, "1 complete")]]

    asyncio.run(run())


@pytest.mark.parametrize(("at_once", "every_s"), [(2, 60.0), (99, 0.1)])
def test_they_are_kept_as_soon_as_there_are_enough_and_after_some_time(monkeypatch, at_once, every_s):
    monkeypatch.setattr(landing, "AT_ONCE", at_once)
    monkeypatch.setattr(landing, "EVERY_S", every_s)

    async def run() -> None:
        kept = Kept()
        rollouts, landed = land(kept, 0.0, 0.0, 30.0)
        async with asyncio.timeout(5):
            while not kept.batches:
                await asyncio.sleep(0.01)
        assert [index for index, _ in kept.batches[0]] == [0, 1]
        rollouts[2].cancel()
        await landed.close()
        assert len(kept.batches) == 1

    asyncio.run(run())


@pytest.mark.parametrize(("gone", "detail"), [(False, "0 complete"), (True, "0")])
def test_what_landed_before_a_collection_failed_is_kept_even_without_the_gateway(gone, detail):
    async def run() -> None:
        kept = Kept()
        rollouts, landed = land(kept, 0.0, 30.0)
        await rollouts[0]
        kept.gone = gone
        rollouts[1].cancel()
        await landed.close()
        assert kept.batches == [[(0, detail)]]

    asyncio.run(run())


def test_a_disk_that_is_full_ends_the_collection_with_its_own_error():
    async def run() -> None:
        def full(landed: Sequence[tuple[int, Outcome]]) -> None:
            raise OSError(28, "No space left on device")

        rollouts = [asyncio.create_task(after(0.0, 0))]
        landed = Landing(rollouts, Kept().complete, full)
        await asyncio.gather(*rollouts)
        with pytest.raises(OSError, match="No space"):
            await landed.all()

    asyncio.run(run())
