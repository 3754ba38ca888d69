"""Deadlines that count only the time in which this process ran."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from gymexp.processes.clock import RunningClock, until_silent

WAITS = """
import asyncio, time
from gymexp.processes.clock import RunningClock, silence

async def main():
    clock = RunningClock().start()
    print("began", flush=True)
    began = time.monotonic()
    await silence(asyncio.Event(), 2.0)
    print(time.monotonic() - began, clock.now())

asyncio.run(main())
"""


def test_time_in_which_the_process_was_stopped_does_not_count():
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "began\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    process.send_signal(signal.SIGCONT)
    passed, counted = map(float, process.communicate(timeout=60)[0].split())
    assert passed > 5.5, "2 s of silence, and 4 s that were none"
    assert counted < passed - 3.0


def test_a_clock_goes_on_while_others_work_and_stands_once_it_is_stopped():
    async def run() -> None:
        clock = RunningClock().start()
        assert clock.start() is clock and clock.now() == 0.0
        began = time.monotonic()
        while clock.now() < 1.0:
            await asyncio.sleep(0.05)
        assert time.monotonic() - began > 0.9
        clock.stop()
        await asyncio.sleep(0)
        at = clock.now()
        await asyncio.sleep(0.6)
        assert clock.now() == at

    asyncio.run(run())


@pytest.mark.parametrize(
    ("says", "taken"),
    [
        (lambda socket: socket.close(), ["1"]),
        (lambda socket: socket.send_bytes(b"2"), ["1"]),
        (lambda socket: socket.send_json("end"), ["1", "end"]),
        (lambda socket: asyncio.sleep(0), ["1"]),
    ],
    ids=["hangs up", "no text", "all is said", "silence"],
)
def test_what_the_other_end_says_is_taken_until_it_hangs_up_or_is_silent_or_all_is_said(says, taken):
    async def talk(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_json("1")
        await asyncio.sleep(1.0)  # longer than half of the patience: what was heard counts
        await says(socket)
        await ended.wait()
        return socket

    async def run() -> list[str]:
        app = web.Application()
        app.router.add_get("/", talk)
        async with TestServer(app) as server, ClientSession() as http:
            async with http.ws_connect(server.make_url("/")) as socket:
                heard: list[str] = []

                def take(message: str) -> bool:
                    heard.append(message)
                    return message == "end"

                await until_silent(socket, take, 1.5)
            ended.set()
        return heard

    ended = asyncio.Event()
    assert asyncio.run(asyncio.wait_for(run(), 30)) == taken
