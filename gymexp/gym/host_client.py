"""The controller's side of NeMo Gym's host, the process that imports NeMo Gym and forks its servers.

A run has a host for each venv that its servers need.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson

from gymexp.errors import ServiceError
from gymexp.gym.install import environ_for, missing_package
from gymexp.gym.server_plan import Layout
from gymexp.processes.failure_reason import reason
from gymexp.processes.process import Child, LocalProcess, Running
from gymexp.record.places import own_servers

_ALIVE_S = 1.0
_HOST_FIRST_S = 0.5  # the supervisor reports the end of the host before that of its servers
_LONGEST_MESSAGE = 2**24  # bytes; one has the errors of all servers that cannot be imported
_HOST = Path(__file__).with_name("host.py")  # not imported: it runs in NeMo Gym's Python


def _path(python: Path) -> str:
    """Returns PATH with the venv's programs first, as under NeMo Gym, and with uv, which servers call."""
    from uv import find_uv_bin

    parts = [str(python.parent), os.environ.get("PATH", os.defpath), os.path.dirname(find_uv_bin())]
    return os.pathsep.join(parts)


class _Forked(LocalProcess):
    """A server process that the host forked."""

    def __init__(self, pid: int, ended: asyncio.Future[int]) -> None:
        super().__init__(pid)
        self._ended = ended

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)  # a caller may be cancelled before the process ends


class GymHost:
    """The process that holds NeMo Gym and forks its servers (`gymexp/gym/host.py`)."""

    def __init__(
        self, python: Path, layout: Layout, sockets: Mapping[str, Any], log: Path, key: str | None = None
    ) -> None:
        """python: an interpreter with NeMo Gym and what the servers need. sockets: the listening socket of
        each server of this host, by name. key: the key that the servers require of every request, also of
        each other's (None: no key)."""
        self._key = key
        self.python = python
        self._layout = layout
        self._sockets = sockets
        self._broken: dict[str, str] = {}  # the servers that cannot be imported, with the error
        self.log = log
        self._loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._starting: asyncio.Queue[asyncio.Future[_Forked]] = asyncio.Queue()
        self._ends: dict[int, asyncio.Future[int]] = {}
        self._order = asyncio.Lock()
        self._gone: ServiceError | None = None  # why no server can be started any more

    async def start(self, on_alive: Callable[[], None] = lambda: None) -> Running:
        """Starts the host process. Servers start once the host has imported NeMo Gym; `start_server` waits
        for that. on_alive: called at each message of the host, which gets a message to answer every second.
        While the host imports NeMo Gym it cannot answer and counts as alive."""
        env = environ_for(self.python) | {
            "PATH": _path(self.python),
            "HF_HOME": os.environ.get("HF_HOME", str(Path.home() / ".cache/huggingface")),
            "RAY_USAGE_STATS_ENABLED": "0",
            # No thread but the main one may run when the host forks. A server is one core's work anyway.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
        }
        fds = {name: sock.fileno() for name, sock in self._sockets.items()}
        with self.log.open("ab") as out:
            self._process = await asyncio.create_subprocess_exec(
                self.python,
                _HOST,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=out,
                env=env,
                pass_fds=tuple(fds.values()),
                start_new_session=True,
                limit=_LONGEST_MESSAGE,
            )
        servers = {
            name: {
                "module": self._layout.modules[name],
                "fd": fd,
                "asked": self._layout.asked.get(name, []),
            }
            for name, fd in fds.items()
        }
        own, judges = str(own_servers()), self._layout.judges
        first = {"config": self._layout.config, "servers": servers, "own": own, "key": self._key}
        self._send(first | {"judges": judges})
        self._reader = asyncio.create_task(self._read(on_alive))
        self._pinger = asyncio.create_task(self._ping(on_alive))
        return Child(self._process)

    async def _ping(self, on_alive: Callable[[], None]) -> None:
        while self._process.returncode is None:
            if self._loaded.done():
                self._send({"alive": True})
            else:
                on_alive()  # the deadline of each server's start covers the import
            await asyncio.sleep(_ALIVE_S)

    async def start_server(self, name: str, log: Path) -> Running:
        """Has the host fork the server `name`; waits until NeMo Gym is imported. Raises ServiceError if the
        host ends, or if the server cannot be imported."""
        await asyncio.shield(self._loaded)
        async with self._order:
            if self._gone:
                raise self._gone
            started: asyncio.Future[_Forked] = asyncio.get_running_loop().create_future()
            self._starting.put_nowait(started)
            self._send({"start": name, "log": str(log)})
            running = await asyncio.shield(started)
        if name in self._broken:
            await running.wait()  # it has written the traceback to its log
            raise ServiceError(self._why_broken(log.parent))
        return running

    def _why_broken(self, logs: Path) -> str:
        """Returns an error message for all servers that cannot be imported."""
        lines = []
        for name, error in self._broken.items():
            envs = [
                env for env, reps in self._layout.replicas.items() if any(name in r.services for r in reps)
            ]
            advice = missing_package(error, self.python)
            at = ", ".join(f"env.{env}" for env in envs)
            lines.append(
                f"{at} cannot start: its server {name} cannot be imported: {error} (log: {logs / name}.log)"
                + (f". {advice[0].upper()}{advice[1:]}" if advice else "")
            )
        return "\n".join(lines)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(orjson.dumps(message) + b"\n")

    async def _read(self, on_alive: Callable[[], None]) -> None:
        """Follows the host until it ends. Then all that still waits for the host gets an error, also if its
        messages cannot be read."""
        what = "NeMo Gym's host ended"
        try:
            await self._follow(on_alive)
        except Exception as error:
            what = f"a message of NeMo Gym's host cannot be read: {type(error).__name__}: {error}"
        error = self._gone = ServiceError(f"{what}. {reason(self.log)}")
        waiting = [self._loaded, *self._ends.values()]
        while not self._starting.empty():
            waiting.append(self._starting.get_nowait())
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # read it, or asyncio logs "exception was never retrieved"

    async def _follow(self, on_alive: Callable[[], None]) -> None:
        """Reads the host's messages until shortly after its end."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            message = orjson.loads(line)
            on_alive()
            if "loaded" in message:
                self._broken = message["broken"]
                self._loaded.set_result(None)
            elif "started" in message:
                ended = self._ends[message["pid"]] = asyncio.get_running_loop().create_future()
                self._starting.get_nowait().set_result(_Forked(message["pid"], ended))
            elif "exited" in message:
                self._ends.pop(message["exited"]).set_result(message["code"])
            elif "error" in message:
                break
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10 * _HOST_FIRST_S):
                await self._process.wait()
        await asyncio.sleep(_HOST_FIRST_S)
