"""A clock that counts only the time in which this process ran.

A process that is stopped and continued (Ctrl-Z and fg, a suspended job, a stalled machine) would otherwise
find all of its deadlines passed at once, although its peers had no time to answer, or answered long ago.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from aiohttp import ClientWebSocketResponse, WSMsgType, web

_TICK_S = 0.25


def this_process() -> dict[str, Any]:
    """Returns fields that identify this process, even if the wall clock is set meanwhile.

    `record.state.process_lives` uses them to decide whether the process still runs.
    """
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "began": time.time(), "ticks": start_ticks(pid)}


def start_ticks(pid: int) -> int | None:
    """Returns when a process started, in kernel ticks since the machine's boot (proc_pid_stat(5)).

    Returns None if the process does not exist, or if the system is not Linux.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def since_start() -> float:
    """Returns the seconds since this process started. On Linux they do not depend on the wall clock."""
    if (ticks := start_ticks(os.getpid())) is None:
        return time.time() - psutil.Process().create_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class RunningClock:
    """Counts the seconds in which this process's event loop ran, after `start`."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._ticking: asyncio.Task[None] | None = None

    def start(self) -> RunningClock:
        self._ticking = self._ticking or asyncio.create_task(self._tick(), name="clock")
        return self

    def stop(self) -> None:
        if self._ticking:
            self._ticking.cancel()

    def now(self) -> float:
        return self._seconds

    async def _tick(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            self._seconds += min(now - last, 2 * _TICK_S)
            last = now


async def silence(heard: asyncio.Event, seconds: float) -> None:
    """Returns once `heard` was not set for `seconds`, counting only time in which this process ran."""
    clock = RunningClock().start()
    try:
        since = clock.now()
        while clock.now() - since < seconds:
            await asyncio.sleep(_TICK_S)
            if heard.is_set():
                heard.clear()
                since = clock.now()
    finally:
        clock.stop()


async def until_silent(
    socket: web.WebSocketResponse | ClientWebSocketResponse,
    take: Callable[[dict[str, Any]], object],
    seconds: float,
) -> None:
    """Calls `take` with each JSON message of a websocket; awaits its result if that is a coroutine.

    Returns when `take` returns True, when the peer closes the connection, or when the peer sends nothing for
    `seconds` in which this process ran. aiohttp's own heartbeat would count time in which it was stopped.
    """
    heard = asyncio.Event()

    async def receive() -> None:
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                break
            heard.set()
            done = take(json.loads(message.data))
            if asyncio.iscoroutine(done):
                done = await done
            if done:
                break

    receiving, quiet = asyncio.create_task(receive()), asyncio.create_task(silence(heard, seconds))
    try:
        await asyncio.wait({receiving, quiet}, return_when=asyncio.FIRST_COMPLETED)
        if receiving.done():
            receiving.result()
    finally:
        receiving.cancel()
        quiet.cancel()
