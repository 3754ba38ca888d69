"""Whole runs on servers that the real `gym env start` brought up, by gymexp or before it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gymexp.config.schema import EnvConfig
from gymexp.gym import attached
from gymexp.processes import ports
from gymexp.processes.parent_watch import __file__ as parent_watch

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
CHANGES = ["trainer.max_steps=1", "evaluation.before=false", "evaluation.after=false"]
ENVS = {
    "sudoku": EnvConfig(
        "resources_servers/reasoning_gym/configs/reasoning_gym.yaml", "reasoning_gym_simple_agent"
    ),
    "workplace": EnvConfig(
        "resources_servers/workplace_assistant/configs/workplace_assistant.yaml",
        "workplace_assistant_simple_agent",
        max_steps=6,
    ),
}


@pytest.fixture
def checkout(tmp_path: Path, gym_python: Path) -> Path:
    """A place to start Gym in; its servers find a venv each, as after a first start, which all are ours."""
    directory = tmp_path / "gym"
    venv = gym_python.parent.parent
    kinds = {
        "resources_servers": ("reasoning_gym", "workplace_assistant"),
        "responses_api_agents": ("simple_agent",),
        "responses_api_models": ("vllm_model",),
    }
    links = [directory / "venvs" / kind / name for kind, names in kinds.items() for name in names]
    for link in [*links, directory]:
        link.mkdir(parents=True, exist_ok=True)
        (link / ".venv").symlink_to(venv)
    (directory / "env.yaml").write_text(f"skip_venv_if_present: true\nuv_venv_dir: {directory / 'venvs'}\n")
    return directory


def check(run) -> None:
    assert run.ended() == 0, run.said
    [entry] = [entry for entry in run.metrics() if "loss" in entry]
    assert entry["sudoku/failed"] == entry["workplace/failed"] == 0
    assert entry["workplace/turns"] > 1
    assert run.left() == []


def test_gymexp_starts_and_ends_the_users_own_gym(started, checkout):
    check(started("cli", "gym.runtime=cli", f"gym.checkout='{checkout}'", *CHANGES))


def test_a_gym_that_cannot_start_ends_the_run_at_once_with_its_last_words(started, checkout):
    (checkout / "env.yaml").write_text("head_server: nonsense\n")
    run = started("broken_cli", "gym.runtime=cli", f"gym.checkout='{checkout}'", *CHANGES)
    assert run.ended() == 1
    assert "gym exited with code" in run.said and str(run.directory / "logs" / "gym.log") in run.said
    assert run.left() == []


def test_a_run_attaches_to_servers_that_are_still_starting(started, checkout):
    with ports.listen() as one, ports.listen() as other:
        head_port, policy_port = one.getsockname()[1], other.getsockname()[1]
    python = checkout / ".venv" / "bin" / "python"
    command = attached.start_command(python, ENVS, head_port, f"http://127.0.0.1:{policy_port}")
    # Its Ray outlives it otherwise.
    reaper = [sys.executable, "-S", parent_watch, str(os.getpid()), "--reap"]
    with (checkout / "log").open("w") as log:
        env = os.environ | attached.start_environment(python)
        gym = subprocess.Popen([*reaper, *command], stdout=log, stderr=log, cwd=checkout, env=env)
    try:
        while not listens(head_port):
            assert gym.poll() is None, (checkout / "log").read_text()
            time.sleep(0.2)
        at = [f"gym.head_port={head_port}", f"gym.policy_port={policy_port}"]
        check(started("attached", "gym.runtime=attach", *at, *CHANGES))
        assert gym.poll() is None, "they are not ours to end"
    finally:
        gym.terminate()
        gym.wait(60)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
