"""A node's agent: starts what the run's lead tells it to, and ends with it.

Signals from outside are the lead's to judge: Slurm sends them to all tasks at once. When the lead says so,
the agent returns; when the lead is gone, it ends all that it runs and raises ServiceError, so that its task
fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp

from gymexp.cluster.job import Task
from gymexp.cluster.lead import SILENCE_S, lead_file
from gymexp.cluster.node import LocalNode
from gymexp.cluster.placement import visible_gpus
from gymexp.errors import ServiceError
from gymexp.processes import ports
from gymexp.processes.clock import until_silent
from gymexp.processes.keys import header
from gymexp.processes.process import Running

log = logging.getLogger(__name__)
_LEAD_TIMEOUT_S = 1800.0  # the lead makes data and NeMo Gym's venv ready before it calls
_CONNECT_TIMEOUT_S = 30.0
_LOOK_S = 0.2
_RSS_S = 2.0


def follow(directory: Path, task: Task) -> None:
    """Work for the run in `directory` until its lead ends. Raises ServiceError if the lead is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which children would inherit
    asyncio.run(_follow(directory, task))


async def _follow(directory: Path, task: Task) -> None:
    lead = await _find_lead(directory, task, _LEAD_TIMEOUT_S)
    if "over" in lead:  # before it called anyone; why is its own to say
        log.info("the lead has nothing to do here: %s", lead["over"])
        return
    here = LocalNode(visible_gpus(), task.node, ports.address_of(task.node))
    async with aiohttp.ClientSession(headers=header(lead["key"])) as http:
        connection = await _connect(http, lead["url"], task)
        agent = Agent(here, connection)
        try:
            hello = {"rank": task.rank, "name": here.name, "address": here.address, "gpus": here.gpus}
            await connection.send_json(hello)
            await agent.work()
        finally:
            agent.end()
            await connection.close()
            here.close()


async def _find_lead(directory: Path, task: Task, timeout_s: float) -> dict[str, Any]:
    """What this attempt's lead has written of itself. Raises ServiceError if it has ended or says nothing."""
    until = time.monotonic() + timeout_s
    path = lead_file(directory)
    while True:
        # Listing makes a network file system look again for what it has not found before.
        if path in directory.iterdir():
            lead = json.loads(path.read_text())
            if lead["attempt"] == task.attempt:
                break
        if time.monotonic() > until:
            raise ServiceError(
                f"{path} was not written within {timeout_s:.0f} s by the lead of job {task.attempt}: see the "
                "log of the job's task 0; is the run directory on a file system that all nodes share?"
            )
        await asyncio.sleep(_LOOK_S)
    return lead


async def _connect(http: aiohttp.ClientSession, url: str, task: Task) -> aiohttp.ClientWebSocketResponse:
    until = time.monotonic() + _CONNECT_TIMEOUT_S
    while True:
        try:
            return await http.ws_connect(f"{url}/node", max_msg_size=0)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if time.monotonic() > until:
                raise ServiceError(
                    f"node {task.node} cannot reach the lead at {url}: {error}. A node's name must resolve "
                    "to an address that the others reach, also on the node itself"
                ) from None
        await asyncio.sleep(_LOOK_S)


class Agent:
    """What runs on this node for the lead at the other end of `connection`."""

    def __init__(self, here: LocalNode, connection: aiohttp.ClientWebSocketResponse) -> None:
        self._here = here
        self._connection = connection
        self._processes: dict[int, Running] = {}
        self._dismissed = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def work(self) -> None:
        """Do what the lead says until it says that this is all. Raises ServiceError if it is gone."""
        self._keep(self._tell_memory())
        await until_silent(self._connection, self._do, SILENCE_S)
        if not self._dismissed:
            raise ServiceError(
                f"the lead is gone: it ended without a word, or was silent for {SILENCE_S:.0f} s; all "
                "that ran here ends"
            )

    def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        for process in self._processes.values():
            process.kill_tree()

    async def _do(self, message: dict[str, Any]) -> bool:
        """Whether this is all that there is to do."""
        match message:
            case {"do": "end"}:
                self._dismissed = True
            case {"do": "start", "id": number, "command": command, "log": log, **more}:
                await self._start(number, command, Path(log), more)
            case {"do": "listen", "id": number}:
                await self._say(id=number, at=dataclasses.asdict(await self._here.listen()))
            case {"do": "reserve", "id": number, "exclusive": exclusive}:
                await self._say(id=number, at=dataclasses.asdict(await self._here.reserve(exclusive)))
            case {"do": what, "process": number} if process := self._processes.get(number):
                if what == "signal":
                    process.signal(message["number"])
                elif what == "terminate":
                    process.terminate()
                else:
                    process.kill_tree()
        return self._dismissed

    async def _start(self, number: int, command: list[str], log: Path, more: dict[str, Any]) -> None:
        try:
            process = await self._here.spawn(command, log, more["env"], more["fds"], more["reap"])
        except OSError as error:
            await self._say(id=number, error=str(error))
            return
        self._processes[number] = process
        await self._say(id=number, pid=process.pid)
        self._keep(self._await_end(number, process))

    async def _await_end(self, number: int, process: Running) -> None:
        code = await process.wait()
        # Kept among the processes: what it started may be left, for `kill` and the end.
        await self._say(ended=number, code=code)

    async def _tell_memory(self) -> None:
        while True:
            await asyncio.sleep(_RSS_S)
            await self._say(rss_mb={number: p.rss_mb for number, p in self._processes.items()})

    async def _say(self, **message: Any) -> None:
        with contextlib.suppress(OSError, aiohttp.ClientError):  # the lead is gone: `work` notices as well
            await self._connection.send_json(message)

    def _keep(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
