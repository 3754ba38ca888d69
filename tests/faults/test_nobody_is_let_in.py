"""What another user of the machine can do with a run: see that it is there."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from whole_run import UNEVALUATED, Run

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="becomes another user"),
]
SUDOKU = ["env=[sudoku]", "env.sudoku.data.train_size=64", "env.sudoku.data.validation_size=8"]
# Becomes `nobody`. Told: URLs, the run's processes, its folder, and how its secrets begin. Says what it got.
STRANGER = Path(__file__).parent / "stranger.py"


def stranger(run: Run, urls: list[str], secrets: list[str]) -> dict:
    """What `nobody` got of the run. It is told the first third of each secret, to know it by."""
    nobody = pwd.getpwnam("nobody")
    told = {
        "uid": nobody.pw_uid,
        "gid": nobody.pw_gid,
        "urls": urls,
        "pids": [run.process.pid, *(process.pid for process in run.left())],
        "folder": str(run.directory),
        "prefixes": [secret[: len(secret) // 3] for secret in secrets],
    }
    done = subprocess.run(
        [sys.executable, STRANGER],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def seen() -> Iterator[Path]:
    """A folder that everyone may look into, as pytest's own are not."""
    before = os.umask(0o022)
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)
    os.umask(before)


def listening(run: Run) -> list[str]:
    """Every TCP port on which any process of the run listens."""
    found = set()
    for process in [psutil.Process(run.process.pid), *run.left()]:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                host, port = connection.laddr[:2]
                found.add(f"http://{host}:{port}")
    return sorted(found)


def refuses(run: Run, urls: list[str]) -> None:
    """Nothing was answered or read, and no file of the run has a key."""
    keys = run.keys()
    secrets = [keys.run, keys.policy, keys.engine]
    assert len(set(secrets)) == 3 and min(map(len, secrets)) >= 40
    got = stranger(run, urls, secrets)
    let_in = {asked: status for asked, status in got["answers"].items() if status != 401}
    assert let_in == {} and len(got["answers"]) > 30 * len(urls)
    assert got["files"] > 10, "it could look"
    assert (got["found"], got["read"], got["signalled"]) == ([], [], [])
    for path in run.directory.rglob("*"):
        held = path.read_bytes() if path.is_file() else b""
        assert not any(secret.encode() in held for secret in secrets), path


def test_another_user_reads_no_key_samples_restarts_and_ends_nothing(started, seen, gym_python, fault):
    run = started(f"{seen}/alone", *SUDOKU, *UNEVALUATED, "trainer.max_steps=1000")
    run.wait_for_step(1)
    services = json.loads((run.directory / "services.json").read_text())
    urls = listening(run)
    assert {services["control_url"], *services["gateway_urls"]} < set(urls)
    assert len(urls) == 6, "control, gateway, engine, and NeMo Gym's model server, agent and environment"
    before = run.status()["services"]
    stranger = fault("Another user of the machine")
    refuses(run, urls)
    stranger.over()
    # Some agents ask NeMo Gym's model server by a client of their own, which knows no key.
    with urllib.request.urlopen(services["replicas"]["sudoku"][0]["url"], timeout=30) as answer:
        assert answer.status == 200, "programs of the run's own user are let in"
    step = max(run.steps())
    run.wait_for_step(step + 2)
    assert run.status()["services"] == before
    assert "starting it again" not in run.said and re.search(r"ended|error", run.said) is None
    run.process.terminate()
    assert run.ended_cleanly() == 143
    assert all(entry["sudoku/failed"] == 0 for entry in run.metrics() if "loss" in entry)


@pytest.mark.vllm
def test_nobody_else_reaches_vllm_either(started, seen, gym_python, vllm, fault):
    run = started(f"{seen}/vllm", *vllm, *SUDOKU, *UNEVALUATED, "trainer.max_steps=1000")
    run.wait_for_step(1)
    at = json.loads((run.directory / "services.json").read_text())["engine_urls"]
    assert set(at) < set(listening(run))
    serving = next(p for p in run.left() if "--middleware" in p.cmdline())
    assert serving.environ()["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0", "weights go through a file"
    stranger = fault("Another user asks vLLM")
    refuses(run, at)
    stranger.over()
    run.wait_for_step(max(run.steps()) + 2)  # weights were sent twice since
    assert "starting it again" not in run.said
    run.process.terminate()
    assert run.ended_cleanly() == 143
