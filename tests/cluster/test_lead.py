"""A lead and its agents: what starts elsewhere is as good as here, and neither outlives the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp
import psutil
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gymexp.cluster import lead as nodes
from gymexp.cluster import node_agent
from gymexp.cluster.lead import Nodes, announce, lead_file
from gymexp.cluster.node import LocalNode, Node, lead_of
from gymexp.cluster.slurm_job import Task, read_task
from gymexp.errors import ConfigError, ServiceError
from gymexp.processes import ports
from gymexp.processes.supervisor import Service, Supervisor
from gymexp.run.control_endpoint import Control

AGENT = """
import sys
from pathlib import Path
from gymexp.errors import GymexpError
from gymexp.cluster import node_agent
from gymexp.cluster.slurm_job import Task
try:
    node_agent.follow(Path(sys.argv[1]), Task(1, 2, "localhost", "7.0"))
except GymexpError as error:
    sys.exit(str(error))
"""
# Starts a child that sleeps, and says its id; ends with code 3 on SIGTERM.
PARENT = """
import signal, subprocess, sys
child = subprocess.Popen(["sleep", "60"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print(child.pid, flush=True)
child.wait()
"""
# Answers one request after the other on the socket that it was given.
SERVER = """
import os, socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
while True:
    client, _ = sock.accept()
    client.recv(65536)
    client.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok")
    client.close()
"""

KEY = "the run's"


class Led(NamedTuple):
    nodes: Nodes
    control: Control
    lost: list[ServiceError]


def task(rank: int, attempt: str = "7.0") -> Task:
    return Task(rank, 2, "localhost", attempt)


@asynccontextmanager
async def leading(directory: Path) -> AsyncIterator[Led]:
    lost: list[ServiceError] = []
    control = Control(ports.listen(), KEY, lambda _: None)
    control.nodes = Nodes(LocalNode([], "first"), task(0), directory, KEY, lost.append)
    async with control:
        yield Led(control.nodes, control, lost)
        await control.nodes.close()


@asynccontextmanager
async def following(directory: Path, led: Led) -> AsyncIterator[tuple[Node, asyncio.Task[None]]]:
    """The second node, and its agent's work in this process."""
    work = asyncio.create_task(node_agent._follow(directory, task(1)))
    here, there = await led.nodes.join(led.control.url)
    assert (here.name, there.name, there.address) == ("first", "localhost", "127.0.0.1")
    yield there, work
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError, ServiceError):
        await work


def told(story: Callable[[Node, asyncio.Task[None], Led], Awaitable[None]], directory: Path) -> None:
    async def run() -> None:
        async with leading(directory) as led, following(directory, led) as (node, work):
            await story(node, work, led)

    asyncio.run(asyncio.wait_for(run(), 30))


async def until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def start_parent(node: Node, tmp_path: Path) -> tuple[nodes.Running, int]:
    """PARENT on a node, and its child's id."""
    log = tmp_path / "parent.log"
    running = await node.spawn([sys.executable, "-S", "-c", PARENT], log)
    await until(lambda: log.exists() and log.read_text().endswith("\n"))
    return running, int(log.read_text())


def test_a_process_elsewhere_has_its_environment_and_log_and_its_end_is_told(tmp_path):
    async def story(node: Node, *_) -> None:
        log = tmp_path / "one.log"
        code = "import os, sys; print(os.environ['WORD']); sys.exit(5)"
        running = await node.spawn([sys.executable, "-S", "-c", code], log, {"WORD": "there"})
        assert await running.wait() == 5
        assert log.read_text() == "there\n"

    told(story, tmp_path)


def test_what_cannot_be_started_is_said_with_its_node(tmp_path):
    async def story(node: Node, *_) -> None:
        with pytest.raises(OSError, match=r"no/such/directory.* \(on node localhost\)"):
            await node.spawn(["true"], tmp_path / "no/such/directory/one.log")

    told(story, tmp_path)


def test_who_no_longer_waits_for_an_end_elsewhere_does_not_disturb_those_who_do(tmp_path):
    async def story(node: Node, *_) -> None:
        running = await node.spawn(
            [sys.executable, "-S", "-c", "import time; time.sleep(60)"], tmp_path / "one.log"
        )
        waiting = asyncio.create_task(running.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        running.signal(signal.SIGTERM)
        assert await running.wait() == -signal.SIGTERM
        assert await (await node.spawn(["true"], tmp_path / "two.log")).wait() == 0, "the node is still there"

    told(story, tmp_path)


def test_a_signal_and_a_kill_of_the_whole_tree_reach_what_runs_elsewhere(tmp_path):
    async def story(node: Node, *_) -> None:
        running, child = await start_parent(node, tmp_path)
        running.terminate()
        assert await running.wait() == 3
        assert alive(child), "it was not asked, and is remembered"
        running.kill_tree()
        await until(lambda: not alive(child))

    told(story, tmp_path)


def test_a_service_elsewhere_comes_back_on_its_address(tmp_path):
    async def story(node: Node, work: asyncio.Task[None], led: Led) -> None:
        supervisor = Supervisor(
            health_interval_s=0.05, health_timeout_s=5, start_timeout_s=20, on_change=lambda: None
        )
        at, log = await node.listen(), tmp_path / "server.log"
        command = [sys.executable, "-S", "-c", SERVER, str(at.fd)]
        server = Service("server", lambda: node.spawn(command, log, fds=[at.fd]), log, at.url, max_restarts=1)
        supervisor.add(server)
        await supervisor.wait_ready(["server"], 20)
        await until(lambda: server.rss_mb > 1)
        server.signal(signal.SIGKILL)
        await until(lambda: server.epoch == 1 and server.state == "ready")
        async with aiohttp.ClientSession() as http, http.get(at.url) as response:
            assert await response.text() == "ok"
        pid = server.pid
        assert pid
        await supervisor.close()
        await until(lambda: not alive(pid))

    told(story, tmp_path)


def test_an_agent_returns_when_the_lead_says_so_and_nothing_of_it_is_left(tmp_path):
    async def story(node: Node, work: asyncio.Task[None], led: Led) -> None:
        running, child = await start_parent(node, tmp_path)
        await led.nodes.close()
        await asyncio.wait_for(work, 10)
        await until(lambda: not alive(running.pid) and not alive(child))
        assert led.lost == []

    told(story, tmp_path)


def test_an_agent_whose_lead_is_gone_ends_what_it_runs_and_fails(tmp_path):
    async def story(node: Node, work: asyncio.Task[None], led: Led) -> None:
        running, child = await start_parent(node, tmp_path)
        await led.control._runner.cleanup()  # hangs up, as a killed lead's kernel does
        with pytest.raises(ServiceError, match="the lead is gone"):
            await asyncio.wait_for(work, 10)
        await until(lambda: not alive(running.pid) and not alive(child))

    told(story, tmp_path)


def follower(directory: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", AGENT, str(directory)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_killed_agents_services_end_the_run_with_the_nodes_name(tmp_path):
    async def run() -> None:
        supervisor = Supervisor(
            health_interval_s=0.05, health_timeout_s=5, start_timeout_s=20, on_change=lambda: None
        )
        async with leading(tmp_path) as led:
            process = follower(tmp_path)
            _, node = await led.nodes.join(led.control.url)
            log = tmp_path / "one.log"
            one = Service("one", lambda: node.spawn(["sleep", "60"], log), log)
            supervisor.add(one)
            await until(lambda: one.pid)
            pid = one.pid
            process.kill()
            with pytest.raises(ServiceError, match="node localhost is lost"):
                await asyncio.wait_for(asyncio.shield(supervisor.failed), 10)
            assert one.running is None
            await supervisor.close()
            process.wait()
            assert pid
            await until(lambda: not alive(pid))

    asyncio.run(asyncio.wait_for(run(), 40))


def test_signals_are_the_leads_to_judge_and_an_idle_node_that_is_lost_is_told(tmp_path):
    async def run() -> None:
        async with leading(tmp_path) as led:
            process = follower(tmp_path)
            await led.nodes.join(led.control.url)
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
                process.send_signal(number)
            await asyncio.sleep(0.3)
            assert process.poll() is None and led.lost == []
            process.kill()
            await until(lambda: led.lost)
            assert "node localhost is lost" in str(led.lost[0])
            process.wait()

    asyncio.run(asyncio.wait_for(run(), 40))


def test_a_lead_that_hangs_is_noticed(tmp_path, monkeypatch):
    """Its sockets stay open, and it answers no ping."""
    monkeypatch.setattr(node_agent, "SILENCE_S", 0.5)

    async def silent(request: web.Request) -> web.WebSocketResponse:
        response = web.WebSocketResponse()
        await response.prepare(request)
        await asyncio.sleep(20)
        return response

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/node", silent)
        server = TestServer(app)
        await server.start_server()
        announce(tmp_path, task(0), url=str(server.make_url("")).rstrip("/"), key="x")
        with pytest.raises(ServiceError, match="the lead is gone"):
            await asyncio.wait_for(node_agent._follow(tmp_path, task(1)), 10)
        await server.close()

    asyncio.run(run())


def test_an_agent_that_hangs_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "SILENCE_S", 4.0)

    async def run() -> None:
        async with leading(tmp_path) as led:
            process = follower(tmp_path)
            await led.nodes.join(led.control.url)
            process.send_signal(signal.SIGSTOP)
            await until(lambda: led.lost)
            process.kill()
            process.wait()

    asyncio.run(asyncio.wait_for(run(), 40))


def test_only_who_knows_the_key_may_join(tmp_path):
    async def story(node: Node, work: asyncio.Task[None], led: Led) -> None:
        async with aiohttp.ClientSession() as http:
            for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer guess"}):
                response = await http.get(f"{led.control.url}/node", headers=headers)
                assert response.status == 401
        assert lead_file(tmp_path).stat().st_mode & 0o777 == 0o600

    told(story, tmp_path)


def test_a_lead_of_an_earlier_attempt_is_not_followed(tmp_path):
    announce(tmp_path, task(0, "7.0"), url="http://127.0.0.1:1", key="old")

    async def run() -> None:
        finding = asyncio.create_task(node_agent._find_lead(tmp_path, task(1, "7.1"), 20))
        await asyncio.sleep(0.5)
        assert not finding.done()
        announce(tmp_path, task(0, "7.1"), url="http://127.0.0.1:2", key="new")
        assert (await finding)["key"] == "new"

    asyncio.run(asyncio.wait_for(run(), 20))


def test_an_agent_waits_for_its_lead_no_longer_than_it_may(tmp_path):
    with pytest.raises(ServiceError, match=r"lead\.json was not written within 0 s .*7\.0.* share\?"):
        asyncio.run(node_agent._find_lead(tmp_path, task(1), 0.3))


def test_an_agent_returns_when_its_lead_has_ended_before_it_called(tmp_path):
    announce(tmp_path, task(0), over="its run has ended")
    asyncio.run(asyncio.wait_for(node_agent._follow(tmp_path, task(1)), 5))


def test_an_agent_says_so_when_it_cannot_reach_the_lead(tmp_path, monkeypatch):
    monkeypatch.setattr(node_agent, "_CONNECT_TIMEOUT_S", 0.3)
    with ports.reserve() as nobody:
        announce(tmp_path, task(0), url=ports.url_of(nobody), key="x")
        with pytest.raises(
            ServiceError, match=r"node localhost cannot reach the lead at http://127\.0\.0\.1"
        ):
            asyncio.run(node_agent._follow(tmp_path, task(1)))


def test_a_lead_names_the_tasks_that_did_not_come_and_tells_latecomers(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "_JOIN_TIMEOUT_S", 0.3)

    async def run() -> None:
        async with leading(tmp_path) as led:
            with pytest.raises(ServiceError, match=r"tasks 1 of job 7\.0 did not join .*, first at http"):
                await led.nodes.join(led.control.url)
        assert json.loads(lead_file(tmp_path).read_text()) == {"attempt": "7.0", "over": "its run has ended"}

    asyncio.run(run())


def test_slurm_says_which_task_this_is():
    environ = {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURMD_NODENAME": "node3", "SLURM_JOB_ID": "41"}
    assert read_task(environ) == Task(2, 3, "node3", "41.0")
    assert read_task(environ | {"SLURM_RESTART_COUNT": "2"}) == Task(2, 3, "node3", "41.2")
    assert read_task({"PATH": os.defpath}) is None


@pytest.mark.parametrize(
    ("there", "said"), [(None, "none is running"), (Task(0, 2, "a", "9.0"), "9.0 has 2")]
)
def test_a_run_over_nodes_needs_a_job_of_as_many(there, said):
    with pytest.raises(ConfigError, match=rf"need a Slurm job of 3 tasks.*{said}.*launcher=slurm"):
        lead_of(3, there)
