"""Plays tasks to their outcomes: many at once, spread over replicas, with bounded retries and waits.

A `Collector` lives in the trainer's process (rank 0) on a thread of its own. It follows the states of the
services, which the controller streams. A rollout whose server was restarted has lost its session and is
played again. A replica above its memory budget gets no new rollouts, and is restarted once its rollouts have
ended, so that no rollout is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import orjson

from gymexp.config.schema import EnvConfig, RolloutConfig
from gymexp.errors import ServiceError
from gymexp.processes import open_files
from gymexp.processes.access_keys import RUN, header_of
from gymexp.record.services_file import Replica, gateway_name
from gymexp.rollout.ahead import Ahead
from gymexp.rollout.attempts import Attempted, knows_versions, with_attempts
from gymexp.rollout.draws import attempt_seed
from gymexp.rollout.landing import Keep, Landing
from gymexp.rollout.outcome import Cause, Failed, Outcome, Played, Task
from gymexp.rollout.play import RolloutFailure, Sampling, play
from gymexp.rollout.progress import Progress
from gymexp.rollout.spare_replicas import SpareReplicas

log = logging.getLogger(__name__)
_AFTER_FAILURE_S = 0.3
_PROGRESS_S = 0.5
_MEANWHILE_S = 1.0
_LONGEST_LINE = 2**24  # bytes, of the services' states


class ControllerGone(ServiceError):
    """The controller closed the connection, which it does not do during a run."""


class Stopped(Exception):
    """The run must end. The collector has dropped the rollouts in flight."""


@dataclass
class _Seat:
    """A replica with its rollouts in flight and the state of its services.

    budget_mb: memory budget of each of its resources servers; None for no limit. epochs: how often each of
    its services has started. draining: whether it gets no new rollouts because it will be restarted.
    """

    replica: Replica
    budget_mb: float | None
    flights: set[asyncio.Task[Played]] = field(default_factory=set)
    epochs: tuple[int, ...] = ()
    ready: bool = True
    draining: bool = False
    awake: bool = True  # a spare replica is not, until it is needed (`spare_replicas`)
    has_played: bool = False  # since its services last started


class Collector:
    """Plays tasks on the replicas of their environments.

    replicas: by environment. vocab_size: of the policy; None if its answers are text alone. control_url: the
    controller's address; None if nothing supervises the servers. gateway_urls: the gateways' addresses, which
    know which weights sampled a rollout; a replica names its own by `Replica.gateway`. Empty leaves the
    rollouts without a version. report: called about twice a second with the current Progress during a
    collection.
    """

    def __init__(
        self,
        replicas: Mapping[str, Sequence[Replica]],
        envs: Mapping[str, EnvConfig],
        rollout: RolloutConfig,
        vocab_size: int | None,
        control_url: str | None = None,
        gateway_urls: Sequence[str] = (),
        report: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._seats = {
            name: [_Seat(one, envs[name].memory_budget_mb, awake=not one.spare) for one in env_replicas]
            for name, env_replicas in replicas.items()
        }
        self._envs = envs
        self._rollout = rollout
        self._vocab_size = vocab_size
        self._control_url = control_url
        self._gateway_urls = gateway_urls
        self._report = report
        self._services: dict[str, dict[str, Any]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="collector", daemon=True)
        self._thread.start()
        self._stop = False
        # Without a gateway nothing knows the weights, and the outcomes stay without them.
        is_complete = knows_versions if gateway_urls else lambda _: True
        play = self._play_task
        self.ahead = Ahead(self._loop, play, self._with_attempts, is_complete, self._report_ahead)
        self._num_collections = 0
        self._submit(self._open()).result()

    def collect(
        self,
        tasks: Sequence[Task],
        samplings: Sequence[Sampling],
        meanwhile: Callable[[], None] | None = None,
        keep: Keep | None = None,
    ) -> list[Outcome]:
        """Plays every task with the sampling of the same index, and returns the outcomes in order.

        meanwhile: called about once a second, in the caller's thread; an exception that it raises ends the
        collection. keep: called in the collector's thread with outcomes soon after they have landed, each
        with its index; also with those that have landed before the collection fails. Raises Stopped after
        `stop`, ControllerGone if the controller is gone, ServiceError if a rollout was sampled with weights
        of two versions or the gateway does not answer which.
        """
        running = self._submit(self._collect(tasks, samplings, keep))
        try:
            while meanwhile and not wait([running], timeout=_MEANWHILE_S).done:
                meanwhile()
            return running.result()
        finally:
            running.cancel()

    def follow(self, outcomes: Sequence[Outcome]) -> None:
        """Changes the numbers of replicas after a batch that `ahead` played; `collect` does so by itself."""
        self._submit(self._spares.follow(outcomes)).result()

    def stop(self) -> None:
        """Ends a running and every later `collect`, and the groups in flight, with Stopped. Safe to call from
        a signal handler."""
        self._stop = True
        self._loop.call_soon_threadsafe(self._wake)

    def close(self) -> None:
        """Closes the connections and ends the thread."""
        self._submit(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _submit(self, coroutine: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _open(self) -> None:
        self._changed = asyncio.Event()
        self._lost_control: str | None = None
        # asyncio keeps only weak references to tasks: without this set, a restart could be garbage-collected.
        self._restarts: set[asyncio.Task[None]] = set()
        self._limits = {name: asyncio.Semaphore(n) for name, n in open_files.concurrency(self._envs).items()}
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        self._spares = SpareReplicas(self._seats, self._http, self._control_url)
        self._watching = asyncio.create_task(self._watch()) if self._control_url else None

    async def _close(self) -> None:
        if self._watching:
            self._watching.cancel()
        await self.ahead.close()
        await self._http.close()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _watch(self) -> None:
        """Follows the controller's stream of service states until the controller closes it. There is no
        timeout: a silent controller may be stopped (Ctrl-Z), and if it ends, this process ends too.
        """
        try:
            url, headers = f"{self._control_url}/watch", header_of(RUN)
            async with self._http.get(url, headers=headers, read_bufsize=_LONGEST_LINE) as response:
                response.raise_for_status()
                while line := await response.content.readline():
                    self._apply_states(orjson.loads(line)["services"])
        except Exception as error:  # nobody awaits this task, so that the rollouts would wait for the servers
            self._lost_control = f"{type(error).__name__}: {error}"
        else:
            self._lost_control = "it closed the connection"
        self._wake()

    def _apply_states(self, services: dict[str, dict[str, Any]]) -> None:
        """Updates all seats. Cancels the rollouts of a replica that has a restarted service."""
        self._services = services
        for seat in (seat for seats in self._seats.values() for seat in seats):
            states = [services[name] for name in seat.replica.services if name in services]
            epochs = tuple(state["epoch"] for state in states)
            if seat.epochs and epochs != seat.epochs:
                seat.draining, seat.has_played = False, False
                for flight in seat.flights:
                    flight.cancel()
            seat.epochs = epochs
            known = not seat.replica.spare or len(states) == len(seat.replica.services)
            seat.ready = known and all(state["state"] == "ready" for state in states)
            self._keep_to_budget(seat)
        self._wake()

    def _keep_to_budget(self, seat: _Seat) -> None:
        """Drains a replica with a resources server above its memory budget, then restarts such servers."""
        # A server may be above its budget from its start. So each start plays at least one rollout.
        if seat.budget_mb is None or not seat.ready or not seat.has_played:
            return
        over_budget = [
            name
            for name in seat.replica.resources
            if self._services.get(name, {}).get("rss_mb", 0) > seat.budget_mb
        ]
        if not over_budget:
            return
        seat.draining = True
        if not seat.flights:
            names = ", ".join(over_budget)
            log.info("restarting %s: above its memory budget of %.0f MB", names, seat.budget_mb)
            for name in over_budget:
                restart = asyncio.create_task(self._restart(name))
                self._restarts.add(restart)
                restart.add_done_callback(self._restarts.discard)

    async def _restart(self, name: str) -> None:
        """Asks the controller to restart a service. If the controller is gone, `_watch` notices it."""
        with contextlib.suppress(aiohttp.ClientError):
            async with self._http.post(f"{self._control_url}/restart/{name}", headers=header_of(RUN)):
                pass

    async def _collect(
        self, tasks: Sequence[Task], samplings: Sequence[Sampling], keep: Keep | None
    ) -> list[Outcome]:
        progress = Progress(total=len(tasks), began=time.monotonic())
        self._num_collections += 1
        reporting = asyncio.create_task(self._report_regularly(progress))
        rollouts = [
            asyncio.create_task(self._play_task(task, sampling, progress))
            for task, sampling in zip(tasks, samplings, strict=True)
        ]
        landing = Landing(rollouts, self._with_attempts, keep) if keep else None
        try:
            played = await asyncio.gather(*rollouts)
            outcomes = await (landing.all() if landing else self._with_attempts(played))
            await self._spares.follow(outcomes)
            return outcomes
        finally:
            for rollout in rollouts:
                rollout.cancel()
            await asyncio.gather(*rollouts, return_exceptions=True)
            if landing:
                await landing.close()
            reporting.cancel()
            self._num_collections -= 1
            self._report(progress)

    def _report_ahead(self, progress: Progress) -> None:
        if not self._num_collections:  # an evaluation reports its own progress
            self._report(progress)

    async def _with_attempts(self, played: Sequence[Attempted]) -> list[Outcome]:
        return await with_attempts(played, self._http)

    async def _report_regularly(self, progress: Progress) -> None:
        while True:
            self._report(progress)
            await asyncio.sleep(_PROGRESS_S)

    async def _play_task(self, task: Task, sampling: Sampling, progress: Progress) -> Attempted:
        """Plays one task, again if an attempt failed or its server was restarted during it. Returns the
        outcome with the last attempt.
        """
        env, began_at = self._envs[task.env], time.time()
        failures: list[RolloutFailure] = []
        async with self._limits[task.env]:
            while True:
                seat = await self._seat_for(task)
                seed = attempt_seed(sampling.seed, len(failures))
                attempt = replace(sampling, seed=seed, play=secrets.token_hex(8))
                replica = seat.replica
                gateway_url = self._gateway_urls[replica.gateway] if self._gateway_urls else None
                playing = play(
                    self._http,
                    replica.url,
                    task,
                    attempt,
                    env.timeout_s,
                    self._vocab_size,
                    replica.max_steps,
                    env.refused_reward,
                    replica.takes_episodes,
                )
                flight = asyncio.create_task(playing)
                seat.flights.add(flight)
                seat.has_played = True
                progress.in_flight += 1
                try:
                    outcome = await self._outcome_of(flight)
                except RolloutFailure as failure:
                    failures.append(failure)
                    log.debug("%s: %s: %s", task.key, failure.cause, failure.detail)
                    outcome = None
                finally:
                    progress.in_flight -= 1
                    seat.flights.discard(flight)
                    if seat.draining and not seat.flights:
                        self._keep_to_budget(seat)
                if outcome is not None:
                    progress.done += 1
                    progress.tokens += sum(len(turn.completion_ids) for turn in outcome.rollout.turns)
                    outcome = _completed(outcome, replica, failures, began_at)
                    return Attempted(outcome, attempt.play, gateway_url)
                is_final = failures and failures[-1].is_final
                if is_final or len(failures) > self._rollout.max_retries:
                    progress.done += 1
                    progress.failed += 1
                    last = failures[-1]
                    causes: list[Cause] = [failure.cause for failure in failures]
                    failed = Failed(task, last.cause, last.detail, self._log_for(seat, last), causes)
                    return Attempted(failed, attempt.play, gateway_url)
                progress.retried += 1
                await asyncio.sleep(_AFTER_FAILURE_S)

    async def _outcome_of(self, flight: asyncio.Task[Played]) -> Played | None:
        """Returns the attempt's outcome; None if it was cancelled because its server was restarted. Raises
        RolloutFailure if it failed, Stopped or ControllerGone if the collection must end.
        """
        stopping = asyncio.create_task(self._raise_when_stopped())
        try:
            await asyncio.wait({flight, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                stopping.result()
            return None if flight.cancelled() else flight.result()
        finally:
            stopping.cancel()
            if not flight.done():
                flight.cancel()
                with contextlib.suppress(asyncio.CancelledError, RolloutFailure):
                    await flight

    async def _raise_when_stopped(self) -> None:
        """Never returns. Raises Stopped once the run must end, ControllerGone once the controller is gone."""
        while True:
            self._raise_if_stopped()
            await self._changed.wait()

    def _raise_if_stopped(self) -> None:
        if self._stop:
            raise Stopped
        if self._lost_control is not None:
            raise ControllerGone(f"the controller is gone: {self._lost_control}")

    async def _seat_for(self, task: Task) -> _Seat:
        """Returns the environment's ready replica with the fewest rollouts in flight, once there is one. The
        controller bounds the wait: it ends the run if a service does not become ready.
        """
        while True:
            self._raise_if_stopped()
            seats = [s for s in self._seats[task.env] if s.awake and s.ready and not s.draining]
            if seats:
                return min(seats, key=lambda seat: len(seat.flights))
            await self._changed.wait()

    def _log_for(self, seat: _Seat, failure: RolloutFailure) -> str:
        """Returns the log file of the service that failed; "" if the controller does not know the service."""
        replica = seat.replica
        name = gateway_name(replica.gateway) if failure.cause == "engine" else failure.server or replica.name
        return self._services.get(name, {}).get("log", "")


def _completed(
    outcome: Played, replica: Replica, failures: Sequence[RolloutFailure], began_at: float
) -> Played:
    """Returns the outcome with its replica, its earlier failures, and the time that it waited. began_at: when
    the collection began (time.time()).
    """
    rollout = outcome.rollout
    queue = round(max(0.0, rollout.began - began_at), 4)
    rollout = replace(rollout, replica=replica.name, seconds=rollout.seconds | {"queue": queue})
    return replace(outcome, rollout=rollout, failures=[failure.cause for failure in failures])
