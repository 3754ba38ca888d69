"""The controller of one run: it starts the services, watches the trainer and ends every process.

    controller
     ├─ gym host ── NeMo Gym's servers (forked)
     ├─ gateways
     ├─ vLLM
     └─ trainer (with the hf engine inside)

The controller opens every listening socket and passes it to the process that serves on it. So addresses are
known before any process starts, and a restarted process keeps its address. With several nodes the controller
runs on the lead node and starts trainers and engines through the agents of the other nodes
(`gymexp.cluster.lead`). The controller imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gymexp.cluster.lead import Nodes
from gymexp.cluster.node import Endpoint, Node, this_node
from gymexp.cluster.placement import Placement, num_nodes, place
from gymexp.cluster.slurm_job import Allocation
from gymexp.config.schema import RunConfig
from gymexp.errors import Interrupted, NodeLost, RunDirectoryError, ServiceError
from gymexp.gym import install
from gymexp.processes import clock, ports
from gymexp.processes.access_keys import Keys
from gymexp.processes.failure_reason import reason
from gymexp.processes.supervisor import Service, Supervisor
from gymexp.record.directory import Ended, RunDirectory
from gymexp.record.places import cache_dir
from gymexp.record.services_file import gateway_name
from gymexp.run import services
from gymexp.run.control_endpoint import Control
from gymexp.run.report_process import Reports
from gymexp.run.system_records import SystemRecorder
from gymexp.run.timeline import Timeline
from gymexp.run.work import TRAINING, Work
from gymexp.view.progress import View

log = logging.getLogger(__name__)
_STATUS_S = 1.0
_BEFORE_TRAINING = ("start", "load model", "load engine")  # phases without anything to save
_SAVING_S = 120.0  # the time that a trainer has to save a last checkpoint after a service failed
_SAME_SIGNAL_S = 2.0  # how long a signal may take to arrive here, as Slurm sends it to each process of a job
_LAST_WORDS_S = 5.0  # the time that rank 0 has to report why it ends, after another rank failed


def run(
    config: RunConfig,
    directory: RunDirectory,
    gym_python: Path,
    site: Path,
    placement: Placement,
    view: View,
    allocation: Allocation | None = None,
    checkpoint: Path | None = None,
    work: Work = TRAINING,
) -> dict[str, Any]:
    """Does the work, and returns the content of its result.json. Leaves no process behind.

    allocation: the Slurm job, if this run is all that the job does; SIGUSR2 then ends the run too, and a
    repeated signal changes nothing. checkpoint: the one to resume from. work: an evaluation has a process in
    the trainer's place. Raises GymexpError if the run fails or a signal ends it.
    """
    controller = Controller(config, directory, placement, view, allocation, checkpoint, work)
    return asyncio.run(controller.run(gym_python, site))


class Controller:
    """Starts, watches and ends the processes of one run. An instance runs once."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        placement: Placement,
        view: View,
        allocation: Allocation | None,
        checkpoint: Path | None,
        work: Work = TRAINING,
    ) -> None:
        self._config = config
        self._work = work
        self._checkpoint = checkpoint
        self._allocation = allocation
        self._placement = placement
        self._directory = directory
        self._view = view
        self._facts: dict[str, Any] = {"phase": "start"}
        self._process = clock.this_process()
        self._end_signal: int | None = None  # the last signal that asked the run to end
        self._stopping = False
        self._old_handlers: dict[int, Any] = {}  # the signal handlers from before the run
        self._ended: Ended | None = None
        self._outcome: str | None = None  # how the run ended, in words
        self._ranks: list[Service] = []  # the trainer's processes
        self._timeline = Timeline(directory, view.say)
        self._system: SystemRecorder | None = None
        self._gym_pythons: list[Path] = []  # the interpreters of the gym hosts

    async def run(self, gym_python: Path, site: Path) -> dict[str, Any]:
        gym = self._config.gym
        local, task = this_node(num_nodes(self._config.placement))
        keys = Keys.new()
        if self._config.engine.urls:  # the user's servers have a key of their own, or none
            keys = dataclasses.replace(keys, engine=os.environ.get("VLLM_API_KEY", ""))
        control = Control(ports.listen(local.address), keys.run, self._on_progress)
        supervisor = control.supervisor = Supervisor(
            health_interval_s=gym.health_interval_s,
            health_timeout_s=gym.health_timeout_s,
            start_timeout_s=gym.start_timeout_s,
            on_change=control.changed,
        )
        sockets: dict[str, socket.socket] = {}
        gateway_socks = services.listen_for_gateways(self._config, self._work, local.address)
        others: Nodes | None = None
        if task:
            others = control.nodes = Nodes(local, task, self._directory.path, keys.run, supervisor.fail)
        writing = asyncio.create_task(self._keep_status(supervisor))
        writing.add_done_callback(supervisor.check)
        self._reports = Reports(self._directory.path, lambda: supervisor.hurried)
        async with control:
            try:
                self._timeline.note(event="start")
                self._catch_signals(supervisor)
                nodes: list[Node] = [local]
                if others:
                    self._directory.result.unlink(missing_ok=True)
                    nodes = await others.join(control.url)
                    self._placement = place(self._config, [node.gpus for node in nodes])
                self._system = SystemRecorder(self._directory, lambda: supervisor.services, self._own_gpus())
                endpoints = await self._open_engines(nodes)
                gateway_urls = [ports.url_of(sock) for sock in gateway_socks]
                gym_args = gym_python, site, gateway_urls, sockets, local.address, keys, self._work
                layout = await services.gym_layout(self._config, self._directory, supervisor, *gym_args)
                keys = dataclasses.replace(keys, policy=layout.policy_key or keys.policy)
                first = nodes[self._placement.training[0].node]
                urls = control.url, gateway_urls
                services.build_services(
                    self._config, self._placement, layout, urls, endpoints, first.address, self._checkpoint
                ).write(self._directory.path)
                self._directory.result.unlink(missing_ok=True)
                if gym.runtime == "managed":
                    by_python = services.by_interpreter(layout, gym_python, site, sockets)
                    self._gym_pythons = list(by_python)
                    hosted = layout, by_python, keys, supervisor.heard
                    for service in services.gym_servers(self._config, self._directory, *hosted):
                        supervisor.add(service)
                master = await first.reserve(exclusive=False)
                self._start(supervisor, sockets, gateway_socks, nodes, endpoints, master, keys)
                result = await self._until_trained(supervisor)
                self._ended, self._outcome = Ended.FINISHED, "finished"
                return result
            except asyncio.CancelledError:
                if self._end_signal is None:
                    raise
                error = self._interrupted("at once")
                self._ended, self._outcome = Ended.STOPPED, str(error)
                raise error from None
            except Exception as failure:
                raise await self._end_of(failure) from None
            finally:
                self._stopping = True
                self._facts["phase"] = "stop"
                if self._system:
                    self._system.close()
                gateways = [gateway_name(number) for number in range(len(gateway_socks))]
                await supervisor.close([rank.name for rank in self._ranks], gateways)
                if others:
                    await others.close()
                writing.cancel()
                self._write_status(supervisor)
                self._timeline.note(event="end")
                await self._reports.end(by_signal=self._end_signal is not None)
                if self._end_signal is None:
                    for number, handler in self._old_handlers.items():
                        signal.signal(number, handler)
                for held in (local, *gateway_socks, *sockets.values()):
                    held.close()

    async def _end_of(self, failure: Exception) -> Exception:
        """Returns the error that ends the run, and keeps it for status.json and result.json."""
        error = self._deeper_cause(failure)
        # A trainer that SIGTERM killed received it before it had installed its handler, and saved nothing.
        unsaved = self._allocation or any(
            rank.exit_code == -signal.SIGTERM or rank.ended_for for rank in self._ranks
        )
        if unsaved and not isinstance(error, Interrupted) and await self._is_ending(error):
            log.warning("the run did not save at its end: %s", error)
            error = self._interrupted("before it could save")
        self._ended = Ended.STOPPED if isinstance(error, Interrupted) else Ended.FAILED
        self._outcome = str(error) or type(error).__name__
        if self._ended is Ended.FAILED:
            self._directory.write_error(self._outcome)
        return error

    def _deeper_cause(self, failure: Exception) -> Exception:
        """Returns an error that names what the run lost (its directory, disk space, NeMo Gym's venv), if that
        is why it failed; else `failure`."""
        if isinstance(failure, Interrupted):
            return failure
        if wrong := self._directory.what_is_wrong():
            return RunDirectoryError(wrong)
        if lost := next(filter(None, (install.lost(p, cache_dir()) for p in self._gym_pythons)), ""):
            advice = f"{lost}; make it anew and go on with: {self._directory.resume_command}"
            self._directory.write_result({"error": f"{failure}\n{advice}"})
            return ServiceError(f"{failure}\n{advice}")
        return failure

    def _own_gpus(self) -> list[str]:
        """Returns the GPUs that the run uses on this node, as CUDA_VISIBLE_DEVICES names them."""
        shares = [*self._placement.training, *self._placement.replicas]
        return sorted({gpu for share in shares if share.node == 0 for gpu in share.gpus})

    async def _open_engines(self, nodes: Sequence[Node]) -> list[Endpoint]:
        """Returns each engine's endpoint: a socket for the hf engine; a reserved port for vLLM, which opens
        its socket itself."""
        placement = self._placement
        if placement.in_trainer:
            return [await nodes[placement.training[0].node].listen()]
        engine_nodes, is_hf = [nodes[share.node] for share in placement.replicas], placement.engine == "hf"
        return [await (node.listen() if is_hf else node.reserve()) for node in engine_nodes]

    def _start(
        self,
        supervisor: Supervisor,
        sockets: dict[str, socket.socket],
        gateway_socks: Sequence[socket.socket],
        nodes: Sequence[Node],
        endpoints: Sequence[Endpoint],
        master: Endpoint,
        keys: Keys,
    ) -> None:
        config, placement, directory = self._config, self._placement, self._directory
        asked, work = list(map(ports.url_of, gateway_socks)), self._work
        engines = services.engines(config, placement, directory, nodes, endpoints, asked, keys, work)
        fds = [endpoint.fd for endpoint in endpoints] if placement.in_trainer else []
        self._ranks = services.trainers(placement, directory, nodes, fds, master, keys, work)
        urls = services.engine_urls(config, endpoints)
        gateways = services.gateways(config, placement, directory, gateway_socks, urls, keys, work)
        for service in (*engines, *self._ranks, *gateways):
            supervisor.add(service)
        names, timeout_s = [*sockets, *(one.name for one in gateways)], config.gym.start_timeout_s
        self._ready = asyncio.create_task(supervisor.wait_ready(names, timeout_s))

    async def _until_trained(self, supervisor: Supervisor) -> dict[str, Any]:
        """Waits for the trainer and returns its result. Raises the first failure of a service or of a start,
        or Interrupted if a signal stopped the trainer."""
        trained = asyncio.create_task(self._trained())
        try:
            waiting: set[asyncio.Future[Any]] = {trained, supervisor.failed, self._ready}
            while not trained.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for future in done - {trained}:
                    if (error := future.exception()) and not await self._is_ending(error):
                        raise await self._cause(error)
            trained.result()
        finally:
            trained.cancel()
            self._ready.cancel()
        result = self._directory.read_result()
        if "step" not in result:
            raise ServiceError(result.get("error", f"the {self._work.process} ended without a result"))
        if result["stopped"]:
            raise self._interrupted(self._work.stopped_after.format(**result))
        return result

    def _interrupted(self, when: str) -> Interrupted:
        number = self._end_signal or signal.SIGTERM
        return Interrupted(
            number,
            f"ended by {signal.Signals(number).name} {when}; go on with: {self._directory.resume_command}",
        )

    async def _trained(self) -> None:
        """Waits until rank 0 ends or another rank fails: rank 0 would wait for a failed rank in vain.

        Raises ServiceError for the rank that failed first, unless rank 0 has written a result.json.
        """
        ranks = self._ranks
        await _until(lambda: ranks[0].epoch or any(rank.exit_code for rank in ranks))
        if any(rank.exit_code for rank in ranks):
            await _until(lambda: all(rank.epoch for rank in ranks), _LAST_WORDS_S)
        failed = [rank for rank in ranks if rank.exit_code]
        if failed and not self._directory.result.exists():
            rank = min(failed, key=lambda rank: rank.ended_at)
            code = 0 if rank.ended_for else rank.exit_code or 0
            raise ServiceError(f"{rank.name} {rank.how_it_ended}. {reason(rank.log, code)}")

    async def _is_ending(self, error: BaseException) -> bool:
        """Returns whether a signal has asked the run to end, which then explains the failure of a service.

        Slurm sends SIGTERM to every process of a job, and it may reach the service before the controller. A
        lost node is always the failure itself: Slurm then sends SIGTERM because the node is lost.
        """
        if isinstance(error, NodeLost):
            return False
        if self._allocation:
            await _until(lambda: self._end_signal is not None, _SAME_SIGNAL_S)
        return self._end_signal is not None

    async def _cause(self, error: BaseException) -> BaseException:
        """Returns the error to raise for a failed service: the trainer's own error if result.json has one.

        If all ranks still run, they save a checkpoint first.
        """
        if self._directory.loss():  # a checkpoint would be written to the directory's old place
            return error
        if self._ranks and all(rank.running for rank in self._ranks):  # ranks would wait for one that is gone
            self._view.say(f"a service failed: {self._work.saving} before the end")
            self._ranks[0].signal(signal.SIGTERM)
            await _until(lambda: not all(rank.running for rank in self._ranks), _SAVING_S)
            return error
        reported = self._directory.read_result().get("error")
        return ServiceError(reported) if reported else error

    def _catch_signals(self, supervisor: Supervisor) -> None:
        """Installs the run's signal handlers: the first signal makes the trainer save a checkpoint and end, a
        second one ends every process at once. In a Slurm job further signals are ignored: Slurm repeats its
        signals, and ends the job by SIGKILL if it must."""
        loop = asyncio.get_running_loop()
        run = asyncio.current_task()
        assert run is not None

        def end(number: int) -> None:
            if self._stopping:
                supervisor.hurry()
                return
            if self._allocation and self._end_signal is not None:
                return
            is_repeated, self._end_signal = self._end_signal is not None, number
            supervisor.let_go()
            nothing_done = self._facts.get("phase") in _BEFORE_TRAINING
            if is_repeated or nothing_done or not self._ranks or not self._ranks[0].running:
                supervisor.hurry()
                run.cancel()
                return
            hint = "" if self._allocation else " (once more to end at once)"
            self._view.say(f"ending: {self._work.saving}{hint}")
            self._ranks[0].signal(signal.SIGTERM)

        def handle(number: int, _: object) -> None:
            # The handler stays installed after an interrupted run, when the loop is closed: do nothing then.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(end, number)

        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR2] if self._allocation else [])]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._old_handlers[number] = signal.signal(number, handle)

    def _on_progress(self, facts: dict[str, Any]) -> None:
        entries = self._timeline.follow(self._facts, facts)
        self._facts = facts
        self._view.update(facts)
        for entry in entries:
            self._view.log(entry["step"], entry["logs"])
            self._reports.ask(entry["logs"])

    def _write_status(self, supervisor: Supervisor) -> None:
        states = {s.name: s.state for s in supervisor.services.values()}
        job = dataclasses.asdict(self._allocation) if self._allocation else {}
        self._directory.write_status(
            seconds=round(clock.since_start(), 2),
            ended=self._ended,
            outcome=self._outcome,
            services=states,
            **self._process,
            **job,
            **self._facts,
        )
        self._view.services(states)

    async def _keep_status(self, supervisor: Supervisor) -> None:
        while True:
            self._write_status(supervisor)
            if lost := self._directory.loss():
                supervisor.hurry()  # with time to save, the trainer would make the directory anew
                supervisor.fail(RunDirectoryError(lost))
            await asyncio.sleep(_STATUS_S)


async def _until(condition: Callable[[], object], timeout_s: float = math.inf) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
