"""One run from claimed directory to result: services started, the trainer watched, everything ended.

    controller
     ├─ gym host ── NeMo Gym's servers (forked)
     ├─ gateway
     ├─ vLLM
     └─ trainer (with the hf engine inside)

The controller holds every listening socket and hands it down, so that addresses are known before anything
starts and survive restarts. With several nodes it is the lead's: trainers and engines start through the other
nodes' agents (`gymexp.cluster.lead`). It imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gymexp.cluster.job import Allocation
from gymexp.cluster.lead import Nodes
from gymexp.cluster.node import Endpoint, Node, this_node
from gymexp.cluster.placement import Placement, num_nodes, place
from gymexp.config.schema import RunConfig
from gymexp.errors import Interrupted, NodeLost, RunDirectoryError, ServiceError
from gymexp.gym import install
from gymexp.gym.hosted import GymHost
from gymexp.processes import clock, ports
from gymexp.processes.keys import Keys
from gymexp.processes.last_words import reason
from gymexp.processes.supervisor import Service, Supervisor
from gymexp.record.directory import Ended, RunDirectory
from gymexp.record.places import cache_dir
from gymexp.run import services
from gymexp.run.control import Control
from gymexp.view.progress import View

log = logging.getLogger(__name__)
_STATUS_S = 1.0
_BEFORE_TRAINING = ("start", "load model", "load engine")  # phases in which there is nothing to save
_SAVING_S = 120.0  # for a trainer's last checkpoint, once a service has failed
_SAME_SIGNAL_S = 2.0  # for a signal to come here, when Slurm sends it to every process of a job
_LAST_WORDS_S = 5.0  # for the first rank to say why it ends, once another one has failed


def run(
    config: RunConfig,
    directory: RunDirectory,
    gym_python: Path,
    site: Path,
    placement: Placement,
    view: View,
    allocation: Allocation | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Train; returns what the trainer's result.json says. Raises GymexpError; no process is left either
    way.

    allocation: the Slurm job that this is all of: then its signals are obeyed as Slurm sends them.
    checkpoint: where to go on from.
    """
    controller = Controller(config, directory, placement, view, allocation, checkpoint)
    return asyncio.run(controller.run(gym_python, site))


class Controller:
    """One run's processes: started, watched, asked to end, and ended. Used once."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        placement: Placement,
        view: View,
        allocation: Allocation | None,
        checkpoint: Path | None,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._allocation = allocation
        self._placement = placement
        self._directory = directory
        self._view = view
        self._facts: dict[str, Any] = {"phase": "start"}
        self._process = clock.this_process()
        self._asked: int | None = None
        self._stopping = False
        self._handlers: dict[int, Any] = {}  # those from before the run
        self._ended: Ended | None = None
        self._outcome: str | None = None  # how it ended, in words
        self._ranks: list[Service] = []  # the trainer's processes
        self._played = False
        self._num_told = 0  # of the trainer's log entries

    async def run(self, gym_python: Path, site: Path) -> dict[str, Any]:
        gym = self._config.gym
        here, task = this_node(num_nodes(self._config.placement))
        keys = Keys.new()
        if self._config.engine.urls:  # servers with a key of their own, or without
            keys = dataclasses.replace(keys, engine=os.environ.get("VLLM_API_KEY", ""))
        control = Control(ports.listen(here.address), keys.run, self._on_progress)
        supervisor = control.supervisor = Supervisor(
            health_interval_s=gym.health_interval_s,
            health_timeout_s=gym.health_timeout_s,
            start_timeout_s=gym.start_timeout_s,
            on_change=control.changed,
        )
        sockets: dict[str, socket.socket] = {}
        gateway_sock = ports.listen(here.address, gym.policy_port or 0, key="gym.policy_port")
        others: Nodes | None = None
        if task:
            others = control.nodes = Nodes(here, task, self._directory.path, keys.run, supervisor.fail)
        writing = asyncio.create_task(self._keep_status(supervisor))
        async with control:
            try:
                self._note(event="start")
                self._catch_signals(supervisor)
                nodes: list[Node] = [here]
                if others:
                    self._directory.result.unlink(missing_ok=True)
                    nodes = await others.join(control.url)
                    self._placement = place(self._config, [node.gpus for node in nodes])
                at = await self._open_engines(nodes)
                gateway_url = ports.url_of(gateway_sock)
                where = gym_python, site, gateway_url, sockets, here.address, keys
                layout = await services.gym_layout(self._config, self._directory, supervisor, *where)
                keys = dataclasses.replace(keys, policy=layout.policy_key or keys.policy)
                first = nodes[self._placement.training[0].node]
                urls = control.url, gateway_url
                services.told(
                    self._config, self._placement, layout, urls, at, first.address, self._checkpoint
                ).write(self._directory.path)
                self._directory.result.unlink(missing_ok=True)
                host_log = self._directory.logs / "gym-host.log"
                host = GymHost(gym_python, layout, sockets, host_log, keys.policy)
                master = await first.reserve(exclusive=False)
                self._start(supervisor, host, sockets, gateway_sock, nodes, at, master, keys)
                result = await self._until_trained(supervisor)
                self._ended, self._outcome = Ended.FINISHED, "finished"
                return result
            except asyncio.CancelledError:
                if self._asked is None:
                    raise
                error = self._interrupted("at once")
                self._ended, self._outcome = Ended.STOPPED, str(error)
                raise error from None
            except Exception as failure:
                raise await self._end_of(failure, gym_python) from None
            finally:
                self._stopping = True
                self._facts["phase"] = "stop"
                await supervisor.close([rank.name for rank in self._ranks], ["gateway"])
                if others:
                    await others.close()
                writing.cancel()
                self._write_status(supervisor)
                self._note(event="end")
                if self._asked is None:
                    for number, handler in self._handlers.items():
                        signal.signal(number, handler)
                here.close()
                for sock in (gateway_sock, *sockets.values()):
                    sock.close()

    async def _end_of(self, failure: Exception, gym_python: Path) -> Exception:
        """What ends the run, noted for status.json and result.json."""
        error = self._deeper_cause(failure, gym_python)
        # A trainer that died of our SIGTERM got it before it could handle it, and saved nothing.
        unheard = self._allocation or any(
            rank.exit_code == -signal.SIGTERM or rank.ended_for for rank in self._ranks
        )
        if unheard and not isinstance(error, Interrupted) and await self._ending(error):
            log.warning("the run did not save at its end: %s", error)
            error = self._interrupted("before it could save")
        self._ended = Ended.STOPPED if isinstance(error, Interrupted) else Ended.FAILED
        self._outcome = str(error) or type(error).__name__
        if self._ended is Ended.FAILED:
            self._directory.write_error(self._outcome)
        return error

    def _deeper_cause(self, failure: Exception, gym_python: Path) -> Exception:
        """What was taken away from under the run, where that is why it fails; else the failure itself."""
        if isinstance(failure, Interrupted):
            return failure
        if wrong := self._directory.what_is_wrong():
            return RunDirectoryError(wrong)
        if lost := install.lost(gym_python, cache_dir()):
            resume = shlex.quote(f"resume={self._directory.path}")
            made_anew = f"{lost}; make it anew and go on with: python -m gymexp.train {resume}"
            self._directory.write_result({"error": f"{failure}\n{made_anew}"})
            return ServiceError(f"{failure}\n{made_anew}")
        return failure

    async def _open_engines(self, nodes: Sequence[Node]) -> list[Endpoint]:
        """Where the engines are to be. vLLM opens its socket itself, on a port kept for it."""
        held = self._placement
        if held.in_trainer:
            return [await nodes[held.training[0].node].listen()]
        there = [nodes[share.node] for share in held.replicas]
        return [await (node.listen() if held.engine == "hf" else node.reserve()) for node in there]

    def _start(
        self,
        supervisor: Supervisor,
        host: GymHost,
        sockets: dict[str, socket.socket],
        gateway_sock: socket.socket,
        nodes: Sequence[Node],
        at: Sequence[Endpoint],
        master: Endpoint,
        keys: Keys,
    ) -> None:
        config, held, directory = self._config, self._placement, self._directory
        if config.gym.runtime == "managed":
            heard = lambda: supervisor.heard("gym-host")  # noqa: E731
            for service in services.gym_servers(config, directory, host, sockets, keys, heard):
                supervisor.add(service)
        url = ports.url_of(gateway_sock)
        for service in services.engines(config, held, directory, nodes, at, url, keys):
            supervisor.add(service)
        fds = [endpoint.fd for endpoint in at] if held.in_trainer else []
        self._ranks = services.trainers(held, directory, nodes, fds, master, keys)
        for service in self._ranks:
            supervisor.add(service)
        urls = services.engine_urls(config, at)
        supervisor.add(services.gateway(config, held, directory, gateway_sock, urls, keys))
        names, patience = [*sockets, "gateway"], config.gym.start_timeout_s
        self._ready = asyncio.create_task(supervisor.wait_ready(names, patience))

    async def _until_trained(self, supervisor: Supervisor) -> dict[str, Any]:
        """Wait for the trainer's end, a failure, or a failed start, whichever is first."""
        trained = asyncio.create_task(self._trained())
        try:
            waiting: set[asyncio.Future[Any]] = {trained, supervisor.failed, self._ready}
            while not trained.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    if one is not trained and (error := one.exception()) and not await self._ending(error):
                        raise await self._cause(error)
            trained.result()
        finally:
            trained.cancel()
            self._ready.cancel()
        result = self._directory.read_result()
        if "step" not in result:
            raise ServiceError(result.get("error", "the trainer ended without a result"))
        if result["stopped"]:
            raise self._interrupted(f"after step {result['step']}")
        return result

    def _interrupted(self, when: str) -> Interrupted:
        number = self._asked or signal.SIGTERM
        return Interrupted(
            number,
            f"ended by {signal.Signals(number).name} {when}; "
            f"go on with: python -m gymexp.train {shlex.quote(f'resume={self._directory.path}')}",
        )

    async def _trained(self) -> None:
        """Wait for the first rank's end, or another one's failure, which the first would wait for in vain.

        Raises ServiceError for the rank that failed first, unless the first rank has said what was wrong.
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

    async def _ending(self, error: BaseException) -> bool:
        """Whether the run is to end anyway, when a service has failed. Slurm's SIGTERM goes to every process
        of a job, and may have reached the service first. A lost node is no such failure: SIGTERM is then what
        Slurm does about it."""
        if isinstance(error, NodeLost):
            return False
        if self._allocation:
            await _until(lambda: self._asked is not None, _SAME_SIGNAL_S)
        return self._asked is not None

    async def _cause(self, error: BaseException) -> BaseException:
        """A trainer that still runs gets to save a checkpoint; one that failed may have said why."""
        if self._directory.loss():  # a checkpoint would be written to where the directory was
            return error
        if self._ranks and all(rank.running for rank in self._ranks):  # one that is gone would be waited for
            self._view.say("a service failed: saving a checkpoint before the end")
            self._ranks[0].signal(signal.SIGTERM)
            await _until(lambda: not all(rank.running for rank in self._ranks), _SAVING_S)
            return error
        said = self._directory.read_result().get("error")
        return ServiceError(said) if said else error

    def _catch_signals(self, supervisor: Supervisor) -> None:
        """The first signal asks the trainer to save and end; a second one ends everything at once, but for
        Slurm's, which repeats its own and knows SIGKILL."""
        loop = asyncio.get_running_loop()
        me = asyncio.current_task()
        assert me is not None

        def asked(number: int) -> None:
            if self._stopping:
                supervisor.hurry()
                return
            if self._allocation and self._asked is not None:
                return
            again, self._asked = self._asked is not None, number
            supervisor.let_go()
            nothing_done = self._facts.get("phase") in _BEFORE_TRAINING
            if again or nothing_done or not self._ranks or not self._ranks[0].running:
                supervisor.hurry()
                me.cancel()
                return
            again = "" if self._allocation else " (once more to end at once)"
            self._view.say(f"ending: saving a checkpoint{again}")
            self._ranks[0].signal(signal.SIGTERM)

        def received(number: int, _: object) -> None:
            # After the end of an interrupted run it is still the handler: one signal more changes nothing.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(asked, number)

        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR2] if self._allocation else [])]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._handlers[number] = signal.signal(number, received)

    def _note(self, **what: Any) -> None:
        """A line of timeline.jsonl; `seconds` since this process started, which is when the command was
        given."""
        since = round(clock.since_start(), 2)
        self._directory.note({"time": round(time.time(), 3), "seconds": since, **what})

    def _on_progress(self, facts: dict[str, Any]) -> None:
        if facts.get("phase") != self._facts.get("phase"):
            self._note(phase=facts.get("phase"))
        if facts.get("done") and not self._played:
            self._played = True
            self._note(event="first rollout")
        entries = facts.pop("entries", [])
        self._facts = facts
        self._view.update(facts)
        for entry in entries:
            if entry["number"] > self._num_told:  # told again where the answer did not arrive
                self._num_told = entry["number"]
                self._view.log(entry["step"], entry["logs"])

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
                supervisor.hurry()  # asked to end, the trainer would save, and make the directory anew
                supervisor.fail(RunDirectoryError(lost))
            await asyncio.sleep(_STATUS_S)


async def _until(holds: Callable[[], object], timeout_s: float = math.inf) -> None:
    until = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < until:
        await asyncio.sleep(0.05)
