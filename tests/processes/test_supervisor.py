"""Services come back after what may go wrong with them, within a limit; and all of them end together."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from gymexp.errors import ServiceError
from gymexp.processes import ports, process, supervisor
from gymexp.processes.process import LocalProcess, spawn
from gymexp.processes.supervisor import Service, Supervisor

# Answers every request on the socket it was given; a request for /crash ends it with code 3.
SERVER = """
import socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
print("serving", flush=True)
while True:
    client, _ = sock.accept()
    if b"/crash" in client.recv(65536):
        print("famous last words", flush=True)
        sys.exit(3)
    client.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok")
    client.close()
"""
# As SERVER, but only the first start becomes one; later ones hang.
HANGS_LATER = (
    """
import os, sys, time
if os.path.exists("started"):
    print("hanging", flush=True)
    time.sleep(60)
open("started", "w").close()
"""
    + SERVER
)


@asynccontextmanager
async def supervising(**settings: float):
    settings = {"health_interval_s": 0.05, "health_timeout_s": 5.0, "start_timeout_s": 30.0} | settings
    keeper = Supervisor(**settings, on_change=lambda: None)
    try:
        yield keeper
    finally:
        await keeper.close()


def service(
    tmp_path: Path, code: str, sock: socket.socket | None = None, reap: bool = False, **kwargs
) -> Service:
    log = tmp_path / "thing.log"
    fds = [sock.fileno()] if sock else []
    command = [sys.executable, "-S", "-c", code, *map(str, fds)]
    return Service(
        "thing",
        lambda: spawn(command, log, fds=fds, cwd=tmp_path, reap=reap),
        log,
        url=ports.url_of(sock) if sock else None,
        **kwargs,
    )


async def until(holds: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        await asyncio.sleep(0.02)


async def failure(keeper: Supervisor) -> str:
    with pytest.raises(ServiceError) as caught:
        await asyncio.wait_for(asyncio.shield(keeper.failed), 20)
    return str(caught.value)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=15) as response:
        return response.read()


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 60))  # type: ignore[arg-type]


def test_a_killed_service_comes_back_at_its_address_and_answers_what_was_asked_meanwhile(tmp_path, caplog):
    async def story() -> None:
        with ports.listen() as sock:
            async with supervising() as keeper:
                thing = service(tmp_path, SERVER, sock, max_restarts=1)
                keeper.add(thing)
                await keeper.wait_ready(["thing"], 20)
                first = thing.pid
                assert first is not None
                os.kill(first, signal.SIGKILL)
                await until(lambda: thing.state == "down")
                asked = asyncio.create_task(asyncio.to_thread(get, f"{thing.url}/meanwhile"))
                await until(lambda: thing.state == "ready")
                assert await asked == b"ok"
                assert thing.pid != first
                assert (thing.epoch, thing.failures) == (1, 1)
                assert not keeper.failed.done()

    run(story)
    assert "thing was ended by SIGKILL; starting it again" in caplog.text


def test_a_service_that_crashes_too_often_fails_the_run_with_its_name_exit_code_and_last_words(tmp_path):
    async def story() -> None:
        async with supervising() as keeper:
            keeper.add(service(tmp_path, "print('famous last words'); raise SystemExit(3)", max_restarts=1))
            said = await failure(keeper)
            assert said.startswith("thing exited with code 3 (failure 2, gym.max_restarts=1)")
            assert str(tmp_path / "thing.log") in said
            assert "famous last words" in said

    run(story)


# Each start notes itself in the file "starts" and ends with an exception before it serves.
FAILS = """
from pathlib import Path
starts = Path("starts")
starts.write_text(starts.read_text() + "." if starts.exists() else ".")
number = len(starts.read_text())
"""


def starts_of(tmp_path: Path, code: str) -> tuple[int, str]:
    """How often a service that may be restarted three times was started, and the error of the run."""

    async def story() -> str:
        with ports.listen() as sock:
            async with supervising() as keeper:
                keeper.add(service(tmp_path, FAILS + code, sock, max_restarts=3, explain=lambda _: "mend it"))
                return await failure(keeper)

    said = asyncio.run(asyncio.wait_for(story(), 60))
    return len((tmp_path / "starts").read_text()), said


def test_a_service_that_fails_at_its_start_twice_in_the_same_way_is_not_started_a_third_time(tmp_path):
    # The address of an object differs between the starts, what went wrong does not.
    starts, said = starts_of(tmp_path, "raise ValueError(f'no level 7 in {object()} of start {number}')")
    assert starts == 2
    assert said.startswith("thing exited with code 1 at its start, twice in the same way: mend it. ValueErr")
    assert "no level 7" in said and str(tmp_path / "thing.log") in said


@pytest.mark.parametrize(
    "code",
    [
        "raise {1: ValueError, 2: KeyError, 3: TypeError, 4: OSError}[number]('other')",
        "raise ConnectionRefusedError(111, 'Connection refused')",  # who listens there may be on its way
        "import urllib.error; raise urllib.error.URLError('no name')",
        "raise OSError(28, 'No space left on device')",
        "raise MemoryError()",
        "raise SystemExit(3)",  # without a word
    ],
)
def test_a_start_that_may_go_well_the_next_time_is_tried_as_often_as_allowed(code, tmp_path):
    starts, said = starts_of(tmp_path, code)
    assert starts == 4 and "(failure 4, gym.max_restarts=3)" in said


def test_a_service_that_has_been_ready_is_restarted_as_often_as_allowed(tmp_path):
    code = FAILS + "if number > 1: raise ValueError('no level 7')\n" + SERVER

    async def story() -> None:
        with ports.listen() as sock:
            async with supervising() as keeper:
                thing = service(tmp_path, code, sock, max_restarts=3)
                keeper.add(thing)
                await keeper.wait_ready(["thing"], 20)
                thing.signal(signal.SIGKILL)
                assert "(failure 4, gym.max_restarts=3)" in await failure(keeper)
                assert len((tmp_path / "starts").read_text()) == 4

    run(story)


def test_a_service_that_may_not_be_restarted_fails_the_run_with_the_signal_that_ended_it(tmp_path):
    async def story() -> None:
        async with supervising() as keeper:
            keeper.add(service(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))
            assert (await failure(keeper)).startswith("thing was ended by SIGSEGV. ")

    run(story)


def test_a_service_whose_program_cannot_be_started_fails_the_run(tmp_path):
    async def story() -> None:
        async def start():
            raise FileNotFoundError(2, "No such file or directory", "no/python")

        async with supervising() as keeper:
            keeper.add(Service("thing", start, tmp_path / "thing.log"))
            said = await failure(keeper)
            assert "thing could not be started" in said
            assert "no/python" in said

    run(story)


def test_a_start_with_an_error_that_nothing_foresaw_fails_the_run_and_the_log_has_its_traceback(tmp_path):
    async def story() -> None:
        async def start():
            raise ModuleNotFoundError("No module named 'uv'")

        log = tmp_path / "thing.log"
        async with supervising() as keeper:
            keeper.add(Service("thing", start, log))
            said = await failure(keeper)
            assert "thing could not be kept running: ModuleNotFoundError: No module named 'uv'" in said
            assert f"(log: {log})" in said
        assert "in start" in log.read_text()

    run(story)


def test_health_checks_with_an_error_that_nothing_foresaw_fail_the_run(tmp_path, monkeypatch):
    async def broken(*_: object) -> bool:
        raise ValueError("not an answer")

    monkeypatch.setattr(Supervisor, "_answers", broken)

    async def story() -> None:
        async with supervising() as keeper:
            with ports.listen() as sock:
                keeper.add(service(tmp_path, "import time; time.sleep(60)", sock))
                assert "thing could not be kept running: ValueError: not an answer" in await failure(keeper)

    run(story)


def test_the_error_of_a_task_that_nobody_awaits_fails_the_run_and_its_end_does_not():
    async def story() -> None:
        async def end() -> None: ...

        async def broken() -> None:
            raise ValueError("no such state")

        async with supervising() as keeper:
            for work in (end(), asyncio.sleep(60)):
                task = asyncio.create_task(work)
                task.add_done_callback(keeper.check)
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
            assert not keeper.failed.done()
            asyncio.create_task(broken()).add_done_callback(keeper.check)
            with pytest.raises(ValueError, match="no such state"):
                await asyncio.wait_for(asyncio.shield(keeper.failed), 20)

    run(story)


def test_a_service_that_hangs_is_killed_after_the_health_timeout_and_started_again(tmp_path, caplog):
    async def story() -> None:
        with ports.listen() as sock:
            async with supervising(health_timeout_s=0.5) as keeper:
                thing = service(tmp_path, SERVER, sock, max_restarts=1)
                keeper.add(thing)
                await keeper.wait_ready(["thing"], 20)
                assert thing.pid is not None
                began = time.monotonic()
                os.kill(thing.pid, signal.SIGSTOP)
                await until(lambda: thing.epoch == 1)
                assert 0.4 < time.monotonic() - began < 5
                await until(lambda: thing.state == "ready")
                assert thing.failures == 1

    run(story)
    assert "thing has not answered for" in caplog.text


def test_a_process_without_health_checks_that_was_stopped_is_ended_and_the_run_told_why(tmp_path):
    async def story() -> None:
        async with supervising(health_timeout_s=0.5) as keeper:
            thing = service(tmp_path, "import time; time.sleep(60)")
            keeper.add(thing)
            await until(lambda: thing.state == "ready")
            await asyncio.sleep(1.0)
            assert thing.epoch == 0, "one that sleeps is well"
            assert thing.pid is not None
            os.kill(thing.pid, signal.SIGSTOP)
            said = await failure(keeper)
            assert re.match(
                r"thing was stopped for 1 s \(SIGSTOP\) and was ended\. .*thing\.log is empty", said
            ), said

    run(story)


def test_one_that_is_stopped_when_it_is_asked_to_end_is_not_waited_for_as_long(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "_STOPPED_AT_END_S", 0.4)

    async def story() -> None:
        async with supervising(health_timeout_s=30.0) as keeper:
            thing = service(tmp_path, "import time; time.sleep(60)", job=True)
            keeper.add(thing)
            await until(lambda: thing.state == "ready")
            assert thing.pid is not None
            os.kill(thing.pid, signal.SIGSTOP)
            await asyncio.sleep(1.0)
            assert thing.epoch == 0
            keeper.let_go()
            await until(lambda: thing.epoch == 1, 10)
            assert thing.exit_code == -signal.SIGKILL and "was stopped" in thing.how_it_ended

    run(story)


def test_one_that_has_to_say_that_it_lives_is_ended_when_it_does_not(tmp_path):
    async def story() -> None:
        async with supervising() as keeper:
            thing = service(tmp_path, "import time; time.sleep(60)", job=True, silence_s=1.0)
            keeper.add(thing)
            for _ in range(15):
                await asyncio.sleep(0.2)
                keeper.heard("thing")
                keeper.heard("nobody of this name")
            assert thing.epoch == 0
            await until(lambda: thing.epoch == 1, 10)
            assert re.match(r"has not answered for \d s and was ended", thing.how_it_ended)

    run(story)


SUPERVISES = """
import asyncio, sys
from pathlib import Path
from gymexp.processes.process import spawn
from gymexp.processes.supervisor import Service, Supervisor

async def main():
    keeper = Supervisor(
        health_interval_s=0.1, health_timeout_s=2.0, start_timeout_s=20.0, on_change=lambda: None
    )
    log = Path("thing.log")
    command, fds = [sys.executable, "-S", "-c", sys.argv[2], sys.argv[1]], [int(sys.argv[1])]
    thing = Service("thing", lambda: spawn(command, log, fds=fds), log, url=sys.argv[3])
    keeper.add(thing)
    await keeper.wait_ready(["thing"], 20)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.sleep(1.0)
    print(thing.epoch, thing.state, flush=True)
    await keeper.close()

asyncio.run(main())
"""


def test_a_supervisor_that_was_stopped_itself_ends_nobody_for_that(tmp_path):
    """Ctrl-Z and fg: when it goes on, the health check in flight has long passed its deadline."""
    with ports.listen() as sock:
        os.set_inheritable(sock.fileno(), True)
        command = [sys.executable, "-c", SUPERVISES, str(sock.fileno()), SERVER, ports.url_of(sock)]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            pass_fds=[sock.fileno()],
        ) as process:
            assert process.stdout and process.stdin
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.5)
            process.send_signal(signal.SIGSTOP)
            time.sleep(4.0)
            process.send_signal(signal.SIGCONT)
            assert process.communicate("\n", timeout=30)[0] == "0 ready\n"


def test_what_a_hanging_service_has_started_ends_with_it(tmp_path):
    """vLLM's engine process, which holds the GPU's memory that the next start needs."""
    below = "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\n"

    async def story() -> None:
        with ports.listen() as sock:
            async with supervising(health_timeout_s=0.5) as keeper:
                thing = service(tmp_path, below + SERVER, sock, reap=True, max_restarts=1)
                keeper.add(thing)
                await keeper.wait_ready(["thing"], 20)
                assert thing.pid is not None
                (reaper,) = psutil.Process(thing.pid).children()
                (server,) = reaper.children()
                server.suspend()
                await until(lambda: thing.epoch == 1)
                first = int(thing.log.read_text().splitlines()[0])
                ended_at = time.monotonic()
                await until(lambda: not any(alive(pid) for pid in (reaper.pid, server.pid, first)))
                assert time.monotonic() < ended_at + 5, "at once, not after the reaper's grace of 10 s"

    run(story)


def test_a_restart_that_hangs_before_it_is_ready_fails_the_run_instead_of_waiting_for_ever(tmp_path):
    async def story() -> None:
        with ports.listen() as sock:
            async with supervising(start_timeout_s=1.0) as keeper:
                thing = service(tmp_path, HANGS_LATER, sock, max_restarts=1)
                keeper.add(thing)
                await keeper.wait_ready(["thing"], 20)
                assert thing.pid is not None
                os.kill(thing.pid, signal.SIGKILL)
                said = await failure(keeper)
                assert "thing has not answered for" in said and "and was ended (failure 2" in said
                assert "hanging" in said

    run(story)


def test_a_slow_but_answering_service_is_left_alone(tmp_path):
    slow = SERVER.replace("    client.sendall", "    import time; time.sleep(0.3)\n    client.sendall")

    async def story() -> None:
        with ports.listen() as sock:
            async with supervising(health_timeout_s=2.0) as keeper:
                thing = service(tmp_path, slow, sock)
                keeper.add(thing)
                await keeper.wait_ready(["thing"], 20)
                await asyncio.sleep(2.5)
                assert (thing.state, thing.epoch) == ("ready", 0)

    run(story)


def test_a_restart_on_purpose_counts_no_failure_and_a_new_epoch(tmp_path, caplog):
    async def story() -> None:
        with ports.listen() as sock:
            async with supervising() as keeper:
                thing = service(tmp_path, SERVER, sock, max_restarts=0)
                keeper.add(thing)
                await keeper.wait_ready(["thing"], 20)
                for epoch in (1, 2):
                    keeper.restart("thing")
                    keeper.restart("thing")  # already under way: nothing more happens
                    await until(lambda epoch=epoch: thing.epoch == epoch)
                    await until(lambda: thing.state == "ready")
                assert (thing.epoch, thing.failures) == (2, 0)
                assert not keeper.failed.done()

    run(story)
    assert caplog.text == ""


def test_waiting_for_a_service_that_never_answers_names_it_and_shows_its_log(tmp_path):
    async def story() -> None:
        with ports.listen() as sock:
            async with supervising() as keeper:
                code = "print('loading', flush=True); import time; time.sleep(60)"
                keeper.add(service(tmp_path, code, sock))
                with pytest.raises(ServiceError) as caught:
                    await keeper.wait_ready(["thing"], 1.5)
                assert "thing did not become ready within 2 s (gym.start_timeout_s)" in str(caught.value)
                assert "    loading" in str(caught.value)

    run(story)


def test_waiting_ends_as_soon_as_another_service_has_failed_the_run(tmp_path):
    async def story() -> None:
        with ports.listen() as sock:
            async with supervising() as keeper:
                keeper.add(service(tmp_path, "raise SystemExit('no such model')"))
                waiting = service(tmp_path, "import time; time.sleep(60)", sock)
                waiting.name = "waiting"
                keeper.add(waiting)
                began = time.monotonic()
                with pytest.raises(ServiceError, match="no such model"):
                    await keeper.wait_ready(["waiting"], 30)
                assert time.monotonic() - began < 15

    run(story)


def test_the_end_of_a_job_is_no_failure_whatever_its_code(tmp_path):
    async def story() -> None:
        async with supervising() as keeper:
            job = service(tmp_path, "raise SystemExit(7)", job=True)
            keeper.add(job)
            await until(lambda: job.epoch == 1)
            await asyncio.sleep(0.3)
            assert (job.epoch, job.failures, job.state) == (1, 0, "down")
            assert not keeper.failed.done()

    run(story)


@pytest.mark.parametrize("stubborn", [False, True], ids=["ends when asked", "ignores SIGTERM"])
def test_closing_leaves_no_process_behind_and_no_grandchild(tmp_path, stubborn, monkeypatch):
    monkeypatch.setattr(supervisor, "_TERM_GRACE_S", 0.5)
    code = (
        "import signal, subprocess, time\n"
        + ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else "")
        + "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        + "print(child.pid, flush=True)\n"
        + "time.sleep(60)"
    )
    pids: list[int] = []

    async def story() -> None:
        async with supervising() as keeper:
            thing = service(tmp_path, code)
            keeper.add(thing)
            await until(lambda: thing.log.exists() and thing.log.read_text().endswith("\n"))
            assert thing.pid is not None
            pids.extend((thing.pid, int(thing.log.read_text())))
        assert thing.state == "stopped"

    run(story)
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process outlived the supervisor"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_closing_does_not_wait_for_servers_whose_host_has_ended(tmp_path):
    """The host is what would have told of their end."""

    async def story() -> None:
        host_is_gone = asyncio.Event()

        child = await spawn(["sleep", "60"], tmp_path / "forked.log")

        class Forked(LocalProcess):
            async def wait(self) -> int:
                await host_is_gone.wait()
                raise ServiceError("the host ended")

        async def start() -> Forked:
            return Forked(child.pid)

        async with supervising() as keeper:
            server = Service("server", start, tmp_path / "server.log")
            keeper.add(server)
            await keeper.wait_ready(["server"], 20)
            began = time.monotonic()
            asyncio.get_running_loop().call_later(0.2, host_is_gone.set)
            await keeper.close()
            assert time.monotonic() - began < 5
        assert not alive(child.pid)

    run(story)


def test_closing_ends_the_first_named_services_before_the_others(tmp_path):
    ended: list[str] = []

    async def story() -> None:
        async with supervising() as keeper:
            for name in ("server", "trainer"):
                one = service(tmp_path, "import time; time.sleep(60)")
                one.name = name
                keeper.add(one)
            await keeper.wait_ready(["server", "trainer"], 20)
            keeper._on_change = lambda: ended.extend(
                n for n, s in keeper.services.items() if s.state == "stopped" and n not in ended
            )
            await keeper.close(["trainer"])

    run(story)
    assert ended == ["trainer", "server"]


def test_a_process_that_the_kernel_ended_for_want_of_memory_is_told_from_one_that_was_killed(monkeypatch):
    assert process.ended(-signal.SIGKILL) == "was ended by SIGKILL"
    monkeypatch.setattr(process, "_OOM_KILLS_BEFORE", process._oom_kills() - 1)
    assert "out of memory" in process.ended(-signal.SIGKILL)
    assert process.ended(-signal.SIGTERM) == "was ended by SIGTERM"


def test_a_spare_service_starts_when_it_is_woken_rests_and_is_woken_again(tmp_path):
    async def story() -> None:
        with ports.listen() as sock:
            async with supervising() as keeper:
                thing = service(tmp_path, SERVER, sock, spare=True)
                keeper.add(thing)
                await keeper.wait_ready(["thing"], 1)  # nobody waits for one that is not needed
                assert not keeper.services and thing.pid is None
                for times in (1, 2):
                    keeper.wake("thing")
                    keeper.wake("thing")  # it runs already
                    await until(lambda: thing.state == "ready")
                    first = thing.pid
                    keeper.rest("thing")
                    assert thing.state == "resting"
                    await until(lambda: not keeper.services)
                    assert first and not psutil.pid_exists(first)
                    assert (thing.epoch, thing.failures) == (times, 0)
                keeper.wake("thing")
                await until(lambda: thing.state == "ready")
                assert not keeper.failed.done()
                last = thing.pid
            assert last and not psutil.pid_exists(last), "it ends with the others"

    run(story)


def test_memory_for_more_services_leaves_a_fifth_free(tmp_path, monkeypatch):
    async def story() -> None:
        async with supervising() as keeper:
            keeper.services["thing"] = service(tmp_path, SERVER)
            keeper.services["thing"].rss_mb = 300.0
            for free, enough in ((501.0, True), (499.0, False)):
                monkeypatch.setattr(supervisor, "memory_mb", lambda free=free: (free, 1000.0))
                assert keeper.has_memory_for(["thing", "unknown"]) is enough
            keeper.services.clear()

    run(story)
