"""The agent of a node: it starts processes for the run's lead, and ends when the lead ends.

The agent ignores signals, because Slurm sends each of them to all tasks at once, and the lead decides what
follows. The agent returns when the lead dismisses it. If the lead is gone, the agent kills its processes and
raises ServiceError, so that its task fails.
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

from gymexp.cluster.lead import SILENCE_S, lead_file
from gymexp.cluster.node import LocalNode
from gymexp.cluster.placement import visible_gpus
from gymexp.cluster.slurm_job import Task
from gymexp.errors import ServiceError
from gymexp.processes import ports
from gymexp.processes.access_keys import header
from gymexp.processes.clock import until_silent
from gymexp.processes.process import Running

log = logging.getLogger(__name__)
_LEAD_TIMEOUT_S = 1800.0  # the lead prepares the data and NeMo Gym's venv before it writes lead.json
_CONNECT_TIMEOUT_S = 30.0
_POLL_S = 0.2
_RSS_INTERVAL_S = 2.0


def follow(directory: Path, task: Task) -> None:
    """Run this node's agent for the run in `directory`, until the lead dismisses it.

    Raises ServiceError if the lead does not appear, cannot be reached, or is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)  # children would inherit SIG_IGN
    asyncio.run(_follow(directory, task))


async def _follow(directory: Path, task: Task) -> None:
    lead = await _find_lead(directory, task, _LEAD_TIMEOUT_S)
    if "over" in lead:  # the lead ended before any agent joined, and reports the reason itself
        log.info("the lead needs no agent: %s", lead["over"])
        return
    node = LocalNode(visible_gpus(), task.node, ports.address_of(task.node))
    async with aiohttp.ClientSession(headers=header(lead["key"])) as http:
        connection = await _connect(http, lead["url"], task)
        agent = Agent(node, connection)
        try:
            hello = {"rank": task.rank, "name": node.name, "address": node.address, "gpus": node.gpus}
            await connection.send_json(hello)
            await agent.work()
        finally:
            agent.end()
            await connection.close()
            node.close()


async def _find_lead(directory: Path, task: Task, timeout_s: float) -> dict[str, Any]:
    """Returns the lead.json of this attempt's lead.

    Raises ServiceError if the lead does not write it within `timeout_s`.
    """
    until = time.monotonic() + timeout_s
    path = lead_file(directory)
    while True:
        # Listing the directory makes a network file system look again for a file that was missing before.
        if path in directory.iterdir():
            lead = json.loads(path.read_text())
            if lead["attempt"] == task.attempt:
                break
        if time.monotonic() > until:
            raise ServiceError(
                f"{path} was not written within {timeout_s:.0f} s by the lead of job {task.attempt}: see the "
                "log of the job's task 0; is the run directory on a file system that all nodes share?"
            )
        await asyncio.sleep(_POLL_S)
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
        await asyncio.sleep(_POLL_S)


class Agent:
    """The processes that run on `node` for the lead at the other end of `connection`."""

    def __init__(self, node: LocalNode, connection: aiohttp.ClientWebSocketResponse) -> None:
        self._node = node
        self._connection = connection
        self._processes: dict[int, Running] = {}
        self._dismissed = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def work(self) -> None:
        """Carry out the lead's messages until it sends `end`. Raises ServiceError if the lead is gone."""
        self._keep(self._report_memory())
        await until_silent(self._connection, self._handle, SILENCE_S)
        if not self._dismissed:
            raise ServiceError(
                f"the lead is gone: it ended without a word, or was silent for {SILENCE_S:.0f} s; "
                "every process on this node is ended"
            )

    def end(self) -> None:
        """Cancel this agent's own tasks and kill its processes with their children."""
        for task in self._tasks:
            task.cancel()
        for process in self._processes.values():
            process.kill_tree()

    async def _handle(self, message: dict[str, Any]) -> bool:
        """Carry out one message of the lead. Returns whether the lead has dismissed this agent."""
        match message:
            case {"do": "end"}:
                self._dismissed = True
            case {"do": "start", "id": number, "command": command, "log": log, **options}:
                await self._start(number, command, Path(log), options)
            case {"do": "listen", "id": number}:
                await self._send(id=number, at=dataclasses.asdict(await self._node.listen()))
            case {"do": "reserve", "id": number, "exclusive": exclusive}:
                await self._send(id=number, at=dataclasses.asdict(await self._node.reserve(exclusive)))
            case {"do": action, "process": number} if process := self._processes.get(number):
                if action == "signal":
                    process.signal(message["number"])
                elif action == "terminate":
                    process.terminate()
                else:
                    process.kill_tree()
        return self._dismissed

    async def _start(self, number: int, command: list[str], log: Path, options: dict[str, Any]) -> None:
        try:
            process = await self._node.spawn(command, log, options["env"], options["fds"], options["reap"])
        except OSError as error:
            await self._send(id=number, error=str(error))
            return
        self._processes[number] = process
        await self._send(id=number, pid=process.pid)
        self._keep(self._await_end(number, process))

    async def _await_end(self, number: int, process: Running) -> None:
        code = await process.wait()
        # The process stays in `_processes`, so that `kill` and `end` reach children that still run.
        await self._send(ended=number, code=code)

    async def _report_memory(self) -> None:
        while True:
            await asyncio.sleep(_RSS_INTERVAL_S)
            await self._send(rss_mb={number: p.rss_mb for number, p in self._processes.items()})

    async def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError, aiohttp.ClientError):  # `work` notices a lost lead as well
            await self._connection.send_json(message)

    def _keep(self, coroutine: Any) -> None:
        """Run `coroutine` as a task that `end` cancels."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
