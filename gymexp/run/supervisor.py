"""The processes of a run: started, watched, restarted within a limit, ended together.

Every process writes to its own log. A service that exits unasked, or answers no health check for too long, is
restarted; one that does so more than `max_restarts` times ends the run with its name, its last words and its
log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import psutil

from gymexp.errors import NodeLost, ServiceError
from gymexp.run import lifeline
from gymexp.run.environment import without_launchers

log = logging.getLogger(__name__)
_TERM_GRACE_S = 15.0
_POLL_S = 0.1


class Running(Protocol):
    """A started process, on whichever node."""

    @property
    def pid(self) -> int: ...

    @property
    def rss_mb(self) -> float:
        """As last seen; 0 where it is not known."""
        ...

    async def wait(self) -> int:
        """Its exit code; negative: a signal's number. Raises ServiceError if what runs it is gone."""
        ...

    def signal(self, number: int) -> None: ...

    def terminate(self) -> None:
        """SIGTERM. What it has started by now is ended by a later `kill_tree`, even where it went before."""
        ...

    def kill_tree(self) -> None:
        """SIGKILL to the process and to what it started."""
        ...


Start = Callable[[], Coroutine[Any, Any, Running]]


@dataclass
class Service:
    """One supervised process. `epoch` counts its starts: a rollout that saw two epochs lost its session
    between."""

    name: str
    start: Start
    log: Path
    url: str | None = None  # answers GET / or GET `health` once ready; None: ready when started
    health: str = "/"
    max_restarts: int = 0
    start_timeout_s: float | None = None  # None: the supervisor's
    explain: Callable[[Path], str] = lambda _: ""  # what to do about the failure that its log shows
    job: bool = False  # ends by itself, once; what its end means is its starter's to judge
    retry_start: bool = True  # one that ends before it was ever ready may do better the next time
    state: str = "new"  # new, starting, ready, restarting, down, stopped
    epoch: int = 0
    exit_code: int | None = None  # of its last end; negative: a signal's number
    ended_at: float = 0.0
    failures: int = 0
    running: Running | None = None
    rss_mb: float = 0.0
    seen: float = field(default=0.0, repr=False)  # when it last answered

    @property
    def pid(self) -> int | None:
        return self.running.pid if self.running else None

    def signal(self, number: int) -> None:
        if self.running:
            self.running.signal(number)


class LocalProcess:
    """A process of this machine, by its id; `wait` is its starter's."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._process = psutil.Process(pid)  # which knows it from a later one of the same id
        except psutil.NoSuchProcess:
            self._process = None
        self._tree: set[psutil.Process] = set()

    @property
    def rss_mb(self) -> float:
        with contextlib.suppress(psutil.Error):
            return self._process.memory_info().rss / 2**20 if self._process else 0.0
        return 0.0

    def signal(self, number: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process:
                self._process.send_signal(number)

    def terminate(self) -> None:
        self._look()
        self.signal(signal.SIGTERM)

    def kill_tree(self) -> None:
        self._look()
        for process in self._tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process:
                self._tree |= {self._process, *self._process.children(recursive=True)}


class Child(LocalProcess):
    """A process started by `spawn`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        super().__init__(process.pid)
        self._child = process

    async def wait(self) -> int:
        return await self._child.wait()


async def spawn(
    command: Sequence[str | os.PathLike[str]],
    log: Path,
    env: Mapping[str, str] | None = None,
    fds: Sequence[int] = (),
    cwd: Path | None = None,
    reap: bool = False,
) -> Child:
    """Start a command in a session of its own, that ends with this process; its output is appended to `log`.

    reap: the command starts processes that may outlive it (Ray's do); they end with it.
    """
    with log.open("ab") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-S",
            lifeline.__file__,
            str(os.getpid()),
            *(["--reap"] if reap else []),
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**without_launchers(), **(env or {})},
            pass_fds=fds,
            cwd=cwd,
            start_new_session=True,
        )
    return Child(process)


def last_lines(path: Path, count: int = 12) -> str:
    """The end of a log, for an error message."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16_000))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"    {line[:300]}" for line in lines[-count:])


class Supervisor:
    """Keeps services running until `close`. `failed` is set to the ServiceError that makes the run
    impossible."""

    def __init__(
        self,
        *,
        health_interval_s: float,
        health_timeout_s: float,
        start_timeout_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self.services: dict[str, Service] = {}
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._health_interval_s = health_interval_s
        self._health_timeout_s = health_timeout_s
        self._start_timeout_s = start_timeout_s
        self._on_change = on_change
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self._letting_go = False
        self._term_grace_s = _TERM_GRACE_S
        self._http: aiohttp.ClientSession | None = None

    def add(self, service: Service) -> None:
        self.services[service.name] = service
        self._tasks.append(asyncio.create_task(self._keep(service), name=service.name))

    async def wait_ready(self, names: Sequence[str], deadline_s: float) -> None:
        """Raises ServiceError if one of `names` is not ready in time, or the run has failed meanwhile."""
        until = time.monotonic() + deadline_s
        while waiting := [n for n in names if self.services[n].state != "ready"]:
            if self.failed.done():
                self.failed.result()
            if time.monotonic() > until:
                service = self.services[waiting[0]]
                raise ServiceError(
                    f"{', '.join(waiting)} did not become ready within {deadline_s:.0f} s "
                    "(gym.start_timeout_s). "
                    f"The end of {service.log}:\n{last_lines(service.log)}"
                )
            await asyncio.sleep(_POLL_S)

    def restart(self, name: str) -> None:
        """End a service on purpose; it comes back, and this is not counted as a failure."""
        service = self.services[name]
        if service.state == "ready" and service.running:
            self._set(service, "restarting")
            service.running.kill_tree()

    def let_go(self) -> None:
        """From now on a service may end: it is not started again, and that is no failure. What asked the run
        to end may have asked the service as well."""
        self._letting_go = True

    def hurry(self) -> None:
        """Let `close`, now or later, wait for nobody's own end."""
        self._term_grace_s = 0.0

    async def close(self, *first: Sequence[str]) -> None:
        """End all services: those of each of `first` together, one after the other, then the rest. Leaves no
        process behind."""
        self._closing = True
        rest = set(self.services).difference(*first)
        for batch in (*first, rest):
            await asyncio.gather(*(self._stop(self.services[n]) for n in batch if n in self.services))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._http:
            await self._http.close()

    async def _stop(self, service: Service) -> None:
        running = service.running
        if running is None:
            if service.state != "down":
                self._set(service, "stopped")
            return
        running.terminate()
        began = time.monotonic()
        while service.running is not None and time.monotonic() < began + self._term_grace_s:
            await asyncio.sleep(0.02)
        running.kill_tree()
        self._set(service, "stopped")

    async def _keep(self, service: Service) -> None:
        """Start, wait for the end, start again: the life of one service."""
        try:
            while not self._closing:
                self._set(service, "starting")
                running = await service.start()
                service.running, service.seen = running, time.monotonic()
                watch = asyncio.create_task(self._watch(service))
                try:
                    code = await running.wait()  # ServiceError: its host is gone, and it as well
                finally:
                    watch.cancel()
                    service.running = None
                asked = service.state == "restarting"
                hopeless = service.state == "starting" and not service.retry_start
                service.epoch, service.exit_code = service.epoch + 1, code
                service.ended_at = time.monotonic()
                self._set(service, "down")
                if self._closing or self._letting_go or service.job:
                    return
                if not asked:
                    service.failures += 1
                    last = hopeless or service.failures > service.max_restarts
                    again = "" if last else "; starting it again"
                    log.warning("%s %s%s (log: %s)", service.name, ended(code), again, service.log)
                    if last:
                        raise ServiceError(
                            f"{service.name} {ended(code)}"
                            + (
                                f" (failure {service.failures}, gym.max_restarts={service.max_restarts})"
                                if service.failures > 1
                                else ""
                            )
                            + f"{_advice(service)}. The end of {service.log}:\n{last_lines(service.log)}"
                        )
                    await asyncio.sleep(min(0.2 * 2**service.failures, 10))
        except ServiceError as error:
            self.fail(error)
        except OSError as error:
            self.fail(ServiceError(f"{service.name} could not be started: {error}"))

    def fail(self, error: ServiceError) -> None:
        """Make it the run's end, unless another failure or the end came first."""
        lets_go = self._letting_go and not isinstance(error, NodeLost)  # no signal of Slurm's does that
        if not self._closing and not lets_go and not self.failed.done():
            self.failed.set_exception(error)
            self.failed.exception()  # looked at: asyncio need not say that nobody did

    async def _watch(self, service: Service) -> None:
        """Ask a service how it is; kill it when it has not answered for `health_timeout_s`.

        One that is starting has `start_timeout_s`: a restart may hang as well.
        """
        if service.url is None:
            self._set(service, "ready")
        while True:
            if service.url is not None:
                answered = await self._ask(service)
                now = time.monotonic()
                if answered:
                    service.seen = now
                    if service.state == "starting":
                        self._set(service, "ready")
                elif now - service.seen > self._patience(service) and service.running:
                    log.warning("%s has not answered for %.0f s: ending it", service.name, now - service.seen)
                    service.running.kill_tree()
            if service.running:
                service.rss_mb = service.running.rss_mb
            await asyncio.sleep(_POLL_S if service.state == "starting" else self._health_interval_s)

    def _patience(self, service: Service) -> float:
        if service.state == "starting":
            return service.start_timeout_s or self._start_timeout_s
        return self._health_timeout_s

    async def _ask(self, service: Service) -> bool:
        self._http = self._http or aiohttp.ClientSession()
        patience = aiohttp.ClientTimeout(
            total=min(self._health_timeout_s, 5.0 if service.state == "starting" else 1e9)
        )
        try:
            async with self._http.get(f"{service.url}{service.health}", timeout=patience) as response:
                return response.status < 500
        except (aiohttp.ClientError, TimeoutError):
            return False

    def _set(self, service: Service, state: str) -> None:
        service.state = state
        self._on_change()


def _advice(service: Service) -> str:
    advice = service.explain(service.log)
    return f": {advice}" if advice else ""


def ended(code: int) -> str:
    """How a process ended, in words; of SIGKILL also whether it may have been for want of memory."""
    if code >= 0:
        return f"exited with code {code}"
    if -code == signal.SIGKILL and (kills := _oom_kills() - _OOM_KILLS_BEFORE) > 0:
        return (
            f"was ended by SIGKILL (out of memory: since the run began the kernel has ended {kills} for "
            "that; ask for more, on Slurm by launcher.mem, or have smaller batches or fewer replicas)"
        )
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _oom_kills() -> int:
    """Of this machine since it started, in its jobs and containers too (proc_vmstat(5), oom_kill)."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


_OOM_KILLS_BEFORE = _oom_kills()
