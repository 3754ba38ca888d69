"""What the controller does with messages of NeMo Gym's host: the host is a script that writes them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from gymexp.errors import ServiceError
from gymexp.gym.host_client import GymHost
from gymexp.gym.server_plan import Layout

SILENT_S = 20.0


def start_of(tmp_path: Path, said: str) -> str:
    """Returns the error of a server's start by a host that says `said` and then nothing more."""
    (tmp_path / "said").write_text(said)
    host = tmp_path / "python"
    host.write_text(f"#!/bin/sh\ncat '{tmp_path}/said'\nexec sleep 60\n")
    host.chmod(0o755)

    async def story() -> str:
        gym = GymHost(host, Layout(), {}, tmp_path / "gym-host.log")
        running = await gym.start()
        try:
            with pytest.raises(ServiceError) as caught:
                await asyncio.wait_for(gym.start_server("judge", tmp_path / "judge.log"), SILENT_S)
            return str(caught.value)
        finally:
            running.kill_tree()
            await running.wait()

    return asyncio.run(story())


def test_a_message_that_cannot_be_read_ends_the_starts_that_wait_for_it(tmp_path):
    assert "a message of NeMo Gym's host cannot be read: JSONDecodeError" in start_of(tmp_path, "no JSON\n")


def test_the_errors_of_many_servers_fit_into_a_message(tmp_path):
    """asyncio's own limit is 64 KiB."""
    broken = {f"server-{number}": "x" * 1000 for number in range(200)}
    said = start_of(tmp_path, json.dumps({"loaded": 1.0, "broken": broken}) + "\n" + "no JSON\n")
    assert "JSONDecodeError" in said
