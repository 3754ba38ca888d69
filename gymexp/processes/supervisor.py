"""The processes of a run: started, watched, restarted within a limit, ended together.

Every process writes to its own log. A service that exits unasked, or gives no sign of life for too long, is
restarted; one that does so more than `max_restarts` times ends the run with its name, its last words and its
log. Signs of life are an answered health check, or what `Supervisor.heard` is told; a process that is stopped
(SIGSTOP) gives none.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from gymexp.errors import GymexpError, NodeLost, ServiceError
from gymexp.processes.clock import RunningClock
from gymexp.processes.keys import header
from gymexp.processes.last_words import reason
from gymexp.processes.process import Running, ended

log = logging.getLogger(__name__)
_TERM_GRACE_S = 15.0
_POLL_S = 0.1
_STOPPED_AT_END_S = 10.0  # for a process that is stopped when it is asked to end


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
    key: str = field(default="", repr=False)  # what it demands of whoever asks it
    max_restarts: int = 0
    start_timeout_s: float | None = None  # None: the supervisor's
    silence_s: float | None = None  # it tells `Supervisor.heard` of itself; at the longest so rarely
    explain: Callable[[Path], str] = lambda _: ""  # what to do about the failure that its log shows
    job: bool = False  # ends by itself, once; what its end means is its starter's to judge
    retry_start: bool = True  # one that ends before it was ever ready may do better the next time
    state: str = "new"  # new, starting, ready, restarting, down, stopped
    epoch: int = 0
    exit_code: int | None = None  # of its last end; negative: a signal's number
    ended_at: float = 0.0
    ended_for: str = ""  # why the supervisor ended it last, where it did
    failures: int = 0
    running: Running | None = None
    rss_mb: float = 0.0
    seen: float = field(default=0.0, repr=False)  # when it last answered, by the supervisor's clock

    @property
    def pid(self) -> int | None:
        return self.running.pid if self.running else None

    def signal(self, number: int) -> None:
        if self.running:
            self.running.signal(number)

    @property
    def how_it_ended(self) -> str:
        return self.ended_for or ended(self.exit_code or 0)


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
        self._clock = RunningClock().start()

    def add(self, service: Service) -> None:
        self.services[service.name] = service
        self._tasks.append(asyncio.create_task(self._keep(service), name=service.name))

    async def wait_ready(self, names: Sequence[str], deadline_s: float) -> None:
        """Raises ServiceError if one of `names` is not ready in time, or the run has failed meanwhile."""
        until = self._clock.now() + deadline_s
        while waiting := [n for n in names if self.services[n].state != "ready"]:
            if self.failed.done():
                self.failed.result()
            if self._clock.now() > until:
                service = self.services[waiting[0]]
                raise ServiceError(
                    f"{', '.join(waiting)} did not become ready within {deadline_s:.0f} s "
                    f"(gym.start_timeout_s). {reason(service.log)}"
                )
            await asyncio.sleep(_POLL_S)

    def restart(self, name: str) -> None:
        """End a service on purpose; it comes back, and this is not counted as a failure."""
        service = self.services[name]
        if service.state == "ready" and service.running:
            self._set(service, "restarting")
            service.running.kill_tree()

    def heard(self, name: str) -> None:
        """A service with `silence_s` lives."""
        if service := self.services.get(name):
            service.seen = self._clock.now()

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
        self._clock.stop()
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
                service.running, service.seen, service.ended_for = running, self._clock.now(), ""
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
                    log.warning("%s %s%s (log: %s)", service.name, service.how_it_ended, again, service.log)
                    if last:
                        raise ServiceError(
                            f"{service.name} {service.how_it_ended}"
                            + (
                                f" (failure {service.failures}, gym.max_restarts={service.max_restarts})"
                                if service.failures > 1
                                else ""
                            )
                            + f"{_advice(service)}. {reason(service.log, 0 if service.ended_for else code)}"
                        )
                    await asyncio.sleep(min(0.2 * 2**service.failures, 10))
        except ServiceError as error:
            self.fail(error)
        except OSError as error:
            self.fail(ServiceError(f"{service.name} could not be started: {error}"))

    def fail(self, error: GymexpError) -> None:
        """Make it the run's end, unless another failure or the end came first."""
        lets_go = self._letting_go and not isinstance(error, NodeLost)  # no signal of Slurm's does that
        if not self._closing and not lets_go and not self.failed.done():
            self.failed.set_exception(error)
            self.failed.exception()  # else asyncio warns that nobody has read the exception

    async def _watch(self, service: Service) -> None:
        """Ask a service how it is; kill it when it has given no sign of life for too long.

        One that is starting has `start_timeout_s`: a restart may hang as well.
        """
        if service.url is None:
            self._set(service, "ready")
        ran = self._clock.now()  # when it was last seen not to be stopped
        while True:
            if service.url is not None and await self._ask(service):
                service.seen = self._clock.now()
                if service.state == "starting":
                    self._set(service, "ready")
            now, running = self._clock.now(), service.running
            if running and not running.is_stopped:
                ran = now
            silent = now - service.seen if service.url or service.silence_s else 0.0
            if running and silent > self._patience(service):
                self._give_up(service, f"has not answered for {silent:.0f} s")
            elif running and now - ran > self._patience_with_stopped:
                self._give_up(service, f"was stopped for {now - ran:.0f} s (SIGSTOP)")
            if running:
                service.rss_mb = running.rss_mb
            await asyncio.sleep(_POLL_S if service.state == "starting" else self._interval)

    def _give_up(self, service: Service, why: str) -> None:
        log.warning("%s %s: ending it", service.name, why)
        service.ended_for = f"{why} and was ended"
        assert service.running is not None
        service.running.kill_tree()

    def _patience(self, service: Service) -> float:
        if service.state == "starting":
            return service.start_timeout_s or self._start_timeout_s
        return service.silence_s or self._health_timeout_s

    @property
    def _patience_with_stopped(self) -> float:
        return min(self._health_timeout_s, _STOPPED_AT_END_S if self._letting_go else math.inf)

    @property
    def _interval(self) -> float:
        return min(self._health_interval_s, _STOPPED_AT_END_S / 4 if self._letting_go else math.inf)

    async def _ask(self, service: Service) -> bool:
        self._http = self._http or aiohttp.ClientSession()
        patience = aiohttp.ClientTimeout(
            total=min(self._health_timeout_s, 5.0 if service.state == "starting" else 1e9)
        )
        try:
            url, headers = f"{service.url}{service.health}", header(service.key)
            async with self._http.get(url, headers=headers, timeout=patience) as response:
                return response.status < 500
        except (aiohttp.ClientError, TimeoutError):
            return False

    def _set(self, service: Service, state: str) -> None:
        service.state = state
        self._on_change()


def _advice(service: Service) -> str:
    advice = service.explain(service.log)
    return f": {advice}" if advice else ""
