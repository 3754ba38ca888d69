"""Starts the processes of a run, watches them, restarts them within a limit, and ends them together.

Every process writes to its own log. The supervisor restarts a service that exits by itself, or that gives no
sign of life for too long. After more than `max_restarts` such failures the run ends with an error that names
the service, the reason in its log, and the log file. A service that was never ready and that ends twice with
the same exception would do so again: that ends the run at once. A sign of life is an answered health check or
a call of `Supervisor.heard`. A process that is stopped (SIGSTOP) gives none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from gymexp.errors import NodeLost, ServiceError
from gymexp.processes.access_keys import header
from gymexp.processes.clock import RunningClock
from gymexp.processes.failure_reason import exception_since, is_same, may_pass, reason
from gymexp.processes.memory import memory_mb
from gymexp.processes.process import Running, ended

log = logging.getLogger(__name__)
_TERM_GRACE_S = 15.0
_POLL_S = 0.1
_STOPPED_AT_END_S = 10.0  # the time that a stopped process (SIGSTOP) gets while the run ends


Start = Callable[[], Coroutine[Any, Any, Running]]


@dataclass
class Service:
    """One supervised process.

    `epoch` counts its ends: if it grows during a rollout, the rollout has lost its session.
    """

    name: str
    start: Start
    log: Path
    url: str | None = None  # answers GET `health` once the service is ready; None: ready when started
    health: str = "/"
    key: str = field(default="", repr=False)  # the key that it demands from its clients
    max_restarts: int = 0
    start_timeout_s: float | None = None  # None: the supervisor's value
    # longest time between two calls of `Supervisor.heard` for this service; None: only health checks count
    silence_s: float | None = None
    explain: Callable[[Path], str] = lambda _: ""  # returns a fix for the failure that the log shows, or ""
    owner: str = ""  # what cannot start without it, e.g. env.sudoku
    start_fix: str = ""  # what to do about a start that fails, if `explain` knows nothing
    job: bool = False  # the process ends once, by itself; the code that added it judges its exit code
    spare: bool = False  # whether it starts with `Supervisor.wake`, and not when it is added
    retry_start: bool = True  # whether to start it again if it ends before it was ready
    state: str = "new"  # new, starting, ready, restarting, resting, down, stopped
    was_ready: bool = False
    start_error: str = ""  # the exception of the last start, as long as none was ready
    epoch: int = 0
    exit_code: int | None = None  # exit code of the last end; negative: the number of a signal
    ended_at: float = 0.0
    ended_for: str = ""  # why the supervisor ended the process; "" if it ended otherwise
    failures: int = 0
    running: Running | None = None
    rss_mb: float = 0.0
    seen: float = field(default=0.0, repr=False)  # time of the last sign of life, by the supervisor's clock

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
    """Keeps services running until `close`.

    `failed` is a future; it raises the error that ends the run, e.g. a ServiceError.
    """

    def __init__(
        self,
        *,
        health_interval_s: float,
        health_timeout_s: float,
        start_timeout_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self.services: dict[str, Service] = {}
        self._spares: dict[str, Service] = {}  # those that do not run
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
        """Starts a service, or keeps it for `wake` if it is a spare one."""
        if service.spare:
            self._spares[service.name] = service
        else:
            self._begin(service)

    def wake(self, name: str) -> None:
        """Starts a spare service that does not run."""
        if not self._closing and (service := self._spares.pop(name, None)):
            self._begin(service)

    def has_memory_for(self, twins: Sequence[str]) -> bool:
        """Returns whether a fifth of the memory stays free with services of the same sizes as `twins`."""
        needed = sum(self.services[name].rss_mb for name in twins if name in self.services)
        free, total = memory_mb()
        return free - needed > total / 5

    def rest(self, name: str) -> None:
        """Ends a service that `wake` started; it is a spare one again once its process has ended."""
        service = self.services.get(name)
        if service and service.spare and service.state == "ready" and service.running:
            self._set(service, "resting")
            service.running.kill_tree()

    def _begin(self, service: Service) -> None:
        self.services[service.name] = service
        self._tasks.append(asyncio.create_task(self._keep(service), name=service.name))

    async def wait_ready(self, names: Sequence[str], deadline_s: float) -> None:
        """Waits until all services of `names` are ready.

        Raises ServiceError if one is not ready within `deadline_s`. If the run fails first, raises its error.
        """
        until = self._clock.now() + deadline_s
        names = [name for name in names if name not in self._spares]
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
        """Restarts a service on purpose, which does not count as a failure."""
        service = self.services[name]
        if service.state == "ready" and service.running:
            self._set(service, "restarting")
            service.running.kill_tree()

    def heard(self, name: str) -> None:
        """Notes a sign of life of a service that has `silence_s`."""
        if service := self.services.get(name):
            service.seen = self._clock.now()

    def let_go(self) -> None:
        """From now on, the end of a service is no failure, and the service is not started again.

        The signal that ends the run may have reached the service as well.
        """
        self._letting_go = True

    def hurry(self) -> None:
        """Makes `close` kill processes without waiting for their end, even if `close` already runs."""
        self._term_grace_s = 0.0

    @property
    def hurried(self) -> bool:
        """Whether `hurry` has been called."""
        return self._term_grace_s == 0

    async def close(self, *first: Sequence[str]) -> None:
        """Ends all services and leaves no process behind.

        first: batches of names. The batches end one after the other, the services of a batch together. The
        services that are in no batch end last.
        """
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
        """Runs one service for its whole life: starts it, waits for its end, starts it again."""
        try:
            while not self._closing:
                self._set(service, "starting")
                log_size = service.log.stat().st_size if service.log.exists() else 0
                running = await service.start()
                service.running, service.seen, service.ended_for = running, self._clock.now(), ""
                watch = asyncio.create_task(self._watch(service))
                watch.add_done_callback(lambda done: self._check_watch(service, done))
                try:
                    code = await running.wait()  # raises ServiceError if the process's host is gone
                finally:
                    watch.cancel()
                    service.running = None
                on_purpose, rests = service.state == "restarting", service.state == "resting"
                is_hopeless = service.state == "starting" and not service.retry_start
                service.epoch, service.exit_code = service.epoch + 1, code
                service.ended_at = time.monotonic()
                self._set(service, "down")
                if rests and not self._closing:
                    self._spares[service.name] = self.services.pop(service.name)
                    self._on_change()
                    return
                if self._closing or self._letting_go or service.job:
                    return
                if not on_purpose:
                    service.failures += 1
                    repeats = _repeats_start(service, log_size)
                    last = is_hopeless or repeats or service.failures > service.max_restarts
                    again = "" if last else "; starting it again"
                    log.warning("%s %s%s (log: %s)", service.name, service.how_it_ended, again, service.log)
                    if last:
                        raise ServiceError(_last_words(service, repeats))
                    await asyncio.sleep(min(0.2 * 2**service.failures, 10))
        except ServiceError as error:
            self.fail(error)
        except OSError as error:
            self.fail(ServiceError(f"{service.name} could not be started: {error}"))
        except Exception as error:  # nobody awaits this task, so that the run would wait for the service
            self._fault(service, error)

    def _check_watch(self, service: Service, watch: asyncio.Task[None]) -> None:
        if not watch.cancelled() and (error := watch.exception()):
            self._fault(service, error)

    def _fault(self, service: Service, error: BaseException) -> None:
        """Ends the run with an error that nothing foresaw, whose traceback the service's log gets."""
        with contextlib.suppress(OSError), service.log.open("a") as out:
            traceback.print_exception(error, file=out)
        what = f"{type(error).__name__}: {error}"
        self.fail(ServiceError(f"{service.name} could not be kept running: {what} (log: {service.log})"))

    def check(self, task: asyncio.Task[Any]) -> None:
        """Ends the run if a task that nobody awaits has failed. To be called once the task is done."""
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Ends the run with an error, unless it already failed or is ending."""
        # While the run ends, services may end too. But no signal of Slurm's makes a node disappear.
        expected = self._letting_go and not isinstance(error, NodeLost)
        if not self._closing and not expected and not self.failed.done():
            self.failed.set_exception(error)
            self.failed.exception()  # or asyncio logs "exception was never retrieved"

    async def _watch(self, service: Service) -> None:
        """Checks the health of a service, and kills it when it has given no sign of life for too long.

        A starting service has `start_timeout_s`, also at a restart, which may hang as well.
        """
        if service.url is None:
            self._set(service, "ready")
        ran = self._clock.now()  # time of the last check at which the process was not stopped
        while True:
            if service.url is not None and await self._answers(service):
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

    async def _answers(self, service: Service) -> bool:
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
        service.was_ready |= state == "ready"
        self._on_change()


def _repeats_start(service: Service, log_size: int) -> bool:
    """Returns whether a service that was never ready has ended with the exception of its start before, and
    will do so again. log_size: of its log before this start."""
    if service.was_ready or service.ended_for or (service.exit_code or 0) <= 0:
        return False
    before, error = service.start_error, exception_since(service.log, log_size)
    service.start_error = error
    return bool(error) and is_same(before, error) and not may_pass(error)


def _last_words(service: Service, repeats: bool) -> str:
    """Returns the error message for a service that is not started again."""
    at_start = not service.was_ready
    name = (
        f"{service.owner} cannot start: its server {service.name}"
        if at_start and service.owner
        else service.name
    )
    count = f" (failure {service.failures}, gym.max_restarts={service.max_restarts})" * (service.failures > 1)
    how = " at its start, twice in the same way" if repeats else count
    advice = service.explain(service.log) or (service.start_fix if at_start else "")
    code = 0 if service.ended_for else service.exit_code or 0
    fix = f": {advice}" if advice else ""
    return f"{name} {service.how_it_ended}{how}{fix}. {reason(service.log, code)}"
