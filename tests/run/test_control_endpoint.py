"""What the controller tells the trainer, and what the trainer may ask of it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiohttp
import orjson

from gymexp.processes import ports
from gymexp.processes.access_keys import header
from gymexp.processes.supervisor import Service
from gymexp.run.control_endpoint import Control

KEY = "the run's"


class Services:
    """Stands in for the supervisor: one service, and which restarts were asked for."""

    def __init__(self) -> None:
        self.services = {"server": Service("server", start=None, log=Path("logs/server.log"))}  # type: ignore[arg-type]
        self.restarts: list[str] = []
        self.alive: list[str] = []
        self.woken: list[str] = []
        self.rested: list[str] = []

    def restart(self, name: str) -> None:
        self.restarts.append(name)

    def has_memory_for(self, twins: list[str]) -> bool:
        return twins == ["small"]

    def wake(self, name: str) -> None:
        self.woken.append(name)

    def rest(self, name: str) -> None:
        self.rested.append(name)

    def heard(self, name: str) -> None:
        self.alive.append(name)


def story(tell) -> list[dict]:
    """Run `tell(http, url, control, services)` against a control; returns the progress that it was sent."""
    progress: list[dict] = []

    async def run() -> None:
        services = Services()
        control = Control(ports.listen(), KEY, progress.append)
        control.supervisor = services  # type: ignore[assignment]
        async with control, aiohttp.ClientSession(headers=header(KEY)) as http:
            await tell(http, control.url, control, services)

    asyncio.run(asyncio.wait_for(run(), 20))
    return progress


def test_a_watcher_is_told_at_once_then_at_every_change_and_at_least_every_second():
    async def tell(http, url, control, services) -> None:
        async with http.get(f"{url}/watch") as response:

            async def line() -> dict:
                return orjson.loads(await response.content.readline())["services"]["server"]

            assert await line() == {"state": "new", "epoch": 0, "rss_mb": 0.0, "log": "logs/server.log"}
            began = time.monotonic()
            services.services["server"].state = "ready"
            control.changed()
            assert (await line())["state"] == "ready"
            assert time.monotonic() - began < 0.7, "not with the next beat"
            assert (await line())["state"] == "ready"
            assert time.monotonic() - began < 5

    story(tell)


def test_a_restart_is_passed_on_and_an_unknown_service_is_not_found():
    async def tell(http, url, control, services) -> None:
        assert (await http.post(f"{url}/restart/server")).status == 200
        refused = await http.post(f"{url}/restart/sever")
        assert refused.status == 404
        assert "no service is named sever" in await refused.text()
        assert services.restarts == ["server"]

    story(tell)


def test_spare_services_are_woken_where_there_is_memory_and_rest():
    async def tell(http, url, control, services) -> None:
        for twin, status in (("small", 200), ("large", 507)):
            asked = {"names": ["a-1", "b-1"], "twins": [twin]}
            assert (await http.post(f"{url}/wake", json=asked)).status == status
        assert services.woken == ["a-1", "b-1"]
        assert (await http.post(f"{url}/rest", json={"names": ["b-1"]})).status == 200
        assert services.rested == ["b-1"]

    story(tell)


def test_progress_reaches_the_view():
    async def tell(http, url, control, services) -> None:
        assert (await http.post(f"{url}/progress", data=b'{"phase": "train", "step": 3}')).status == 200

    assert story(tell) == [{"phase": "train", "step": 3}]


def test_a_watcher_that_hangs_up_disturbs_nobody():
    async def tell(http, url, control, services) -> None:
        first = await http.get(f"{url}/watch")
        await first.content.readline()
        first.close()
        control.changed()
        async with http.get(f"{url}/watch") as second:
            assert await second.content.readline()

    story(tell)


def test_a_trainer_may_say_that_it_lives():
    async def tell(http, url, control, services) -> None:
        async with http.post(f"{url}/alive/trainer-1") as response:
            assert response.status == 200
        assert services.alive == ["trainer-1"]

    assert story(tell) == []
