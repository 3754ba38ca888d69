"""The lead's side of a run over several nodes: it starts processes and opens sockets through their agents.

Under Slurm one task a node runs the same job. Task 0 is the lead and runs the controller. The other tasks are
agents (`gymexp.cluster.node_agent`), which connect to the lead and carry out its messages. `lead.json` in the
run directory has the lead's address and key, and only its owner can read the file.

Lead and agent exchange JSON objects over a websocket. The lead sends {"do": "start", "id", "command", "env",
"log", "fds", "reap"}, {"do": "listen", "id"}, {"do": "reserve", "id", "exclusive"}, {"do": "signal",
"process", "number"}, {"do": "terminate" | "kill", "process"}, {"do": "end"}, and {"do": "beat"} after some
seconds without another message. The agent first sends {"rank", "name", "address", "gpus"}. It answers each
message that has an id with {"id", …}, which has "error" if the action failed. It sends {"ended": process,
"code"} when a process ends, and {"rss_mb": {process: …}} at intervals. A process has the id of the `start`
message that started it.
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

from gymexp.cluster.node import Endpoint, LocalNode, Node
from gymexp.cluster.slurm_job import Task
from gymexp.errors import NodeLost, ServiceError
from gymexp.files import replace_file
from gymexp.processes.clock import until_silent
from gymexp.processes.process import Running

log = logging.getLogger(__name__)
SILENCE_S = 60.0  # a node that sends nothing for so long is lost; a node whose agent ends is lost at once
_HEARTBEAT_S = 5.0
_JOIN_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 10.0


@dataclass
class _RemoteProcess:
    """A process that an agent started. send: sends the agent an action on this process, with its fields."""

    pid: int
    ended: asyncio.Future[int]
    send: Callable[..., None]
    rss_mb: float = 0.0
    is_stopped: bool = False  # agents do not report this

    async def wait(self) -> int:
        return await asyncio.shield(self.ended)  # a cancelled caller must not cancel it for other callers

    def signal(self, number: int) -> None:
        self.send("signal", number=int(number))

    def terminate(self) -> None:
        self.send("terminate")

    def kill_tree(self) -> None:
        self.send("kill")


@dataclass
class RemoteNode:
    """Another machine of the run, reached through its agent. lost: the error of a lost node, else None."""

    name: str
    address: str
    gpus: list[str]
    socket: web.WebSocketResponse
    lost: NodeLost | None = None
    _ids: itertools.count[int] = field(default_factory=itertools.count)
    _answers: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    _processes: dict[int, _RemoteProcess] = field(default_factory=dict)
    _outbox: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)

    async def listen(self) -> Endpoint:
        return Endpoint(**(await self._request(do="listen"))["at"])

    async def reserve(self, exclusive: bool = True) -> Endpoint:
        return Endpoint(**(await self._request(do="reserve", exclusive=exclusive))["at"])

    async def spawn(
        self,
        command: Sequence[str | os.PathLike[str]],
        log: Path,
        env: Mapping[str, str] | None = None,
        fds: Sequence[int] = (),
        reap: bool = False,
    ) -> Running:
        words = [os.fspath(word) for word in command]
        fields = {"command": words, "log": str(log), "env": dict(env or {}), "fds": list(fds), "reap": reap}
        answer = await self._request(do="start", **fields)
        return self._processes[answer["id"]]

    def send(self, **message: Any) -> None:
        """Queue a message for the agent. Messages go out in order; none goes out once the node is lost."""
        self._outbox.put_nowait(message)

    async def serve(self) -> None:
        """Exchange messages with the agent until it hangs up or sends nothing for SILENCE_S. The node is lost
        then: each pending request, and each wait for a process, raises NodeLost."""
        sending = asyncio.create_task(self._send_queued())
        try:
            await until_silent(self.socket, self._handle, SILENCE_S)
        finally:
            sending.cancel()
            self.lost = NodeLost(
                f"node {self.name} is lost: its agent ended, or was silent for {SILENCE_S:.0f} s. "
                "Its processes are gone. Slurm's log of the job may say why; resume the run without the node "
                f"(Slurm's --exclude={self.name})"
            )
            for future in (*self._answers.values(), *(p.ended for p in self._processes.values())):
                if not future.done():
                    future.set_exception(self.lost)
                    # Read the exception, or asyncio logs that nobody did if the run ends before any wait.
                    future.exception()

    @property
    def busy(self) -> bool:
        """Whether the node has processes or pending requests, whose callers notice a lost node themselves."""
        return bool(self._processes or self._answers)

    async def _send_queued(self) -> None:
        with contextlib.suppress(OSError):  # `serve` notices a closed connection when it reads
            while True:
                try:
                    async with asyncio.timeout(_HEARTBEAT_S):
                        message = await self._outbox.get()
                except TimeoutError:
                    message = {"do": "beat"}
                await self.socket.send_json(message)

    async def _request(self, **message: Any) -> dict[str, Any]:
        """Send a message to the agent and return its answer.

        Raises NodeLost if the node is lost, ServiceError without an answer within _ANSWER_TIMEOUT_S, and
        OSError with the agent's error.
        """
        if self.lost:
            raise self.lost
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self.send(id=number, **message)
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                return await answer
        except TimeoutError:
            raise ServiceError(
                f"node {self.name} did not {message['do']} within {_ANSWER_TIMEOUT_S:.0f} s"
            ) from None
        finally:
            del self._answers[number]

    def _handle(self, message: dict[str, Any]) -> None:
        """Apply one message of the agent."""
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
            if "pid" in message:
                # Not left to `spawn`, which runs later: the next message may already be the process's end.
                ended = asyncio.get_running_loop().create_future()
                send = _sender_for(self, number)
                self._processes[number] = _RemoteProcess(message["pid"], ended, send)
            answer.set_result(message)


def _sender_for(node: RemoteNode, process: int) -> Callable[..., None]:
    """Returns a function that sends `node`'s agent an action on one process."""
    return lambda do, **fields: node.send(do=do, process=process, **fields)


class Nodes:
    """The nodes of one run: the lead's own node, and the others as their agents join. `welcome` answers GET
    /node.

    directory: the run's. key: the key of the endpoint that agents join at (`gymexp.processes.access_keys`).
    on_lost: called when a node without processes and pending requests is lost, as nothing else reports it.
    """

    def __init__(
        self,
        lead_node: LocalNode,
        task: Task,
        directory: Path,
        key: str,
        on_lost: Callable[[ServiceError], None],
    ) -> None:
        self._lead_node = lead_node
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
        """Write the lead's `url` to lead.json and wait for the agents. Returns all nodes, by rank.

        Raises ServiceError with the ranks that did not join within _JOIN_TIMEOUT_S.
        """
        announce(self._directory, self._task, url=url, key=self._key)
        expected = set(range(1, self._task.count))
        try:
            async with asyncio.timeout(_JOIN_TIMEOUT_S):
                while expected - self._others.keys():
                    self._joined.clear()
                    await self._joined.wait()
        except TimeoutError:
            missing = ", ".join(map(str, sorted(expected - self._others.keys())))
            raise ServiceError(
                f"tasks {missing} of job {self._task.attempt} did not join the lead, {self._lead_node.name} "
                f"at {url}, within {_JOIN_TIMEOUT_S:.0f} s: each node must run the same job (srun, one task "
                f"a node), see {self._directory}, and reach that address"
            ) from None
        return [self._lead_node, *(self._others[rank] for rank in sorted(expected))]

    async def welcome(self, request: web.Request) -> web.StreamResponse:
        """Let an agent join by a websocket, and serve its node until the agent leaves or is lost."""
        response = web.WebSocketResponse()
        await response.prepare(request)
        self._open += 1
        try:
            hello = await response.receive_json(timeout=SILENCE_S)
            rank = hello.pop("rank")
            node = self._others[rank] = RemoteNode(socket=response, **hello)
            log.info("node %s has joined", node.name)
            self._joined.set()
            await node.serve()
            if not self._ending:
                log.warning("%s", node.lost)
                if not node.busy and node.lost:
                    self._on_lost(node.lost)
        finally:
            self._open -= 1
            self._left.set()
        return response

    async def close(self) -> None:
        """End the agents and the processes that they still run."""
        self._ending = True
        announce(self._directory, self._task, over="its run has ended")  # for agents that have not joined
        for node in self._others.values():
            node.send(do="end")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_TIMEOUT_S):
                while self._open:
                    self._left.clear()
                    await self._left.wait()


def announce(directory: Path, task: Task, **fields: str) -> None:
    """Write `lead.json`: {"attempt", "url", "key"}, or {"attempt", "over"} once the lead has ended."""
    replace_file(lead_file(directory), json.dumps({"attempt": task.attempt} | fields), mode=0o600)


def lead_file(directory: Path) -> Path:
    """Returns the path of the run's lead.json, which has the lead's address and key."""
    return directory / "lead.json"
