"""The nodes of a run as its lead sees them: where processes start, sockets are opened and GPUs are.

Under Slurm one task a node runs the same job. Task 0 is the lead, with the controller; the others are agents
(`gymexp.cluster.agent`) that connect to the lead and do what it says. The lead's address, and its key, are in
`lead.json` in the run directory, for its owner's eyes alone.

Over the connection, a websocket, go JSON objects. The lead's: {"do": "start", "id", "command", "env", "log",
"fds", "reap"}, {"do": "listen", "id"}, {"do": "reserve", "id", "exclusive"}, {"do": "signal", "process",
"number"}, {"do": "terminate" | "kill", "process"}, {"do": "end"}, and {"do": "beat"} when it has said nothing
for a while. The agent's:
first {"rank", "name", "address", "gpus"}, then {"id", …} in answer, with "error" where it failed, {"ended":
process, "code"}, and {"rss_mb": {process: …}} now and then. A process is called by the id of what started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from gymexp.cluster.job import Task
from gymexp.cluster.node import Endpoint, LocalNode, Node
from gymexp.errors import NodeLost, ServiceError
from gymexp.files import replace_file
from gymexp.processes.clock import until_silent
from gymexp.processes.process import Running

log = logging.getLogger(__name__)
SILENCE_S = 60.0  # a node of which nothing was heard for so long is lost; one whose agent ends, at once
_BEAT_S = 5.0
_JOIN_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 10.0


@dataclass
class _RemoteProcess:
    """A process that an agent started."""

    pid: int
    ended: asyncio.Future[int]
    tell: Callable[..., None]
    rss_mb: float = 0.0
    is_stopped: bool = False  # not told over nodes

    async def wait(self) -> int:
        return await asyncio.shield(self.ended)  # who waits may be cancelled before it has ended

    def signal(self, number: int) -> None:
        self.tell("signal", number=int(number))

    def terminate(self) -> None:
        self.tell("terminate")

    def kill_tree(self) -> None:
        self.tell("kill")


@dataclass
class RemoteNode:
    """Another machine, through its agent."""

    name: str
    address: str
    gpus: list[str]
    socket: web.WebSocketResponse
    lost: NodeLost | None = None
    _ids: itertools.count[int] = field(default_factory=itertools.count)
    _answers: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    _processes: dict[int, _RemoteProcess] = field(default_factory=dict)
    _out: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)

    async def listen(self) -> Endpoint:
        return Endpoint(**(await self._ask(do="listen"))["at"])

    async def reserve(self, exclusive: bool = True) -> Endpoint:
        return Endpoint(**(await self._ask(do="reserve", exclusive=exclusive))["at"])

    async def spawn(
        self,
        command: Sequence[str | os.PathLike[str]],
        log: Path,
        env: Mapping[str, str] | None = None,
        fds: Sequence[int] = (),
        reap: bool = False,
    ) -> Running:
        words = [os.fspath(word) for word in command]
        asked = {"command": words, "log": str(log), "env": dict(env or {}), "fds": list(fds), "reap": reap}
        answer = await self._ask(do="start", **asked)
        return self._processes[answer["id"]]

    def tell(self, **message: Any) -> None:
        """In order, and without waiting; nothing where the node is lost."""
        self._out.put_nowait(message)

    async def talk(self) -> None:
        """Pass on what the agent says, until it hangs up or falls silent."""
        sending = asyncio.create_task(self._send())
        try:
            await until_silent(self.socket, self._take, SILENCE_S)
        finally:
            sending.cancel()
            self.lost = NodeLost(
                f"node {self.name} is lost: its agent ended, or was silent for {SILENCE_S:.0f} s. "
                "What ran there is gone. Slurm's log of the job may say why; resume the run without the node "
                f"(Slurm's --exclude={self.name})"
            )
            for future in (*self._answers.values(), *(p.ended for p in self._processes.values())):
                if not future.done():
                    future.set_exception(self.lost)
                    future.exception()  # looked at: the run may have ended before anyone waits for it

    @property
    def busy(self) -> bool:
        """Whether anyone waits for what its processes come to."""
        return bool(self._processes or self._answers)

    async def _send(self) -> None:
        with contextlib.suppress(OSError):  # the reader notices as well
            while True:
                try:
                    message = await asyncio.wait_for(self._out.get(), _BEAT_S)
                except TimeoutError:
                    message = {"do": "beat"}
                await self.socket.send_json(message)

    async def _ask(self, **message: Any) -> dict[str, Any]:
        if self.lost:
            raise self.lost
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self.tell(id=number, **message)
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                return await answer
        except TimeoutError:
            raise ServiceError(
                f"node {self.name} did not {message['do']} within {_ANSWER_TIMEOUT_S:.0f} s"
            ) from None
        finally:
            del self._answers[number]

    def _take(self, message: dict[str, Any]) -> None:
        if "rss_mb" in message:
            for number, rss_mb in message["rss_mb"].items():
                if process := self._processes.get(int(number)):
                    process.rss_mb = rss_mb
        elif "ended" in message:
            self._processes.pop(message["ended"]).ended.set_result(message["code"])
        elif answer := self._answers.get(number := message["id"]):
            if "error" in message:
                answer.set_exception(OSError(f"{message['error']} (on node {self.name})"))
                return
            if "pid" in message:  # here, not where it is awaited: its end may be the next message
                ended = asyncio.get_running_loop().create_future()
                tell = _teller(self, number)
                self._processes[number] = _RemoteProcess(message["pid"], ended, tell)
            answer.set_result(message)


def _teller(node: RemoteNode, process: int) -> Callable[..., None]:
    return lambda do, **more: node.tell(do=do, process=process, **more)


class Nodes:
    """Those of one run, this one first, the others as they join. Its `welcome` answers GET /node.

    directory: the run's. key: of the endpoint that they join at (`gymexp.processes.keys`). on_lost: told when
    a node goes away of which nothing else says so.
    """

    def __init__(
        self,
        here: LocalNode,
        task: Task,
        directory: Path,
        key: str,
        on_lost: Callable[[ServiceError], None],
    ) -> None:
        self._here = here
        self._task = task
        self._directory = directory
        self._on_lost = on_lost
        self._key = key
        self._others: dict[int, RemoteNode] = {}
        self._joined = asyncio.Event()
        self._ending = False
        self._open = 0
        self._left = asyncio.Event()

    async def join(self, url: str) -> list[Node]:
        """Say in the run directory that the lead is at `url`, and wait for the others; all, by rank.

        Raises ServiceError with those that did not come.
        """
        announce(self._directory, self._task, url=url, key=self._key)
        expected = set(range(1, self._task.count))
        try:
            async with asyncio.timeout(_JOIN_TIMEOUT_S):
                while expected - self._others.keys():
                    self._joined.clear()
                    await self._joined.wait()
        except TimeoutError:
            away = ", ".join(map(str, sorted(expected - self._others.keys())))
            raise ServiceError(
                f"tasks {away} of job {self._task.attempt} did not join the lead, {self._here.name} at "
                f"{url}, within {_JOIN_TIMEOUT_S:.0f} s: each node must run the same job (srun, one task a "
                f"node), see {self._directory}, and reach that address"
            ) from None
        return [self._here, *(self._others[rank] for rank in sorted(expected))]

    async def welcome(self, request: web.Request) -> web.StreamResponse:
        response = web.WebSocketResponse()
        await response.prepare(request)
        self._open += 1
        try:
            hello = await response.receive_json(timeout=SILENCE_S)
            rank = hello.pop("rank")
            node = self._others[rank] = RemoteNode(socket=response, **hello)
            log.info("node %s has joined", node.name)
            self._joined.set()
            await node.talk()
            if not self._ending:
                log.warning("%s", node.lost)
                if not node.busy and node.lost:
                    self._on_lost(node.lost)
        finally:
            self._open -= 1
            self._left.set()
        return response

    async def close(self) -> None:
        """End the agents, and what they still run."""
        self._ending = True
        announce(self._directory, self._task, over="its run has ended")  # to those that have not joined
        for node in self._others.values():
            node.tell(do="end")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_TIMEOUT_S):
                while self._open:
                    self._left.clear()
                    await self._left.wait()


def announce(directory: Path, task: Task, **said: str) -> None:
    """Write `lead.json`: {"attempt", "url", "key"}, or "over" in place of the last two."""
    replace_file(lead_file(directory), json.dumps({"attempt": task.attempt} | said), mode=0o600)


def lead_file(directory: Path) -> Path:
    """Where the lead writes how it is reached."""
    return directory / "lead.json"
