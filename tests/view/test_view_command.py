"""The command `gymexp view`: what it prints, what it refuses, what it exports."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from viewed_runs import write_run
from whole_run import ROOT


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("viewed") / "run")


def refused(run: Path, *arguments: str, code: int = 1) -> str:
    command = [sys.executable, "-m", "gymexp.view", str(run), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_the_command_serves_until_it_is_interrupted(run, monkeypatch):
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 1 10.0.0.2 22")
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "gymexp.view", str(run)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout
        address = process.stdout.readline().removeprefix("open ").strip()
        port = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=[\w-]{43}", address)
        assert port, address
        assert f"ssh -N -L {port[1]}:127.0.0.1:{port[1]} " in process.stdout.readline()
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        assert b"Held-out reward" in opener.open(address, timeout=60).read()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0 and process.stderr and not process.stderr.read()
    finally:
        process.kill()


def test_a_port_that_is_taken_is_named(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port must be free on this machine, but {port} is not" in refused(run, "--port", str(port))


def test_another_host_is_refused_with_the_tunnel(run):
    text = refused(run, "--host", "0.0.0.0", "--port", "8123")
    assert "--host must be 127.0.0.1, got 0.0.0.0" in text and "ssh -N -L 8123:127.0.0.1:8123" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--export", "{}/page", "--steps", "9:"], "no rollout is exported: of 28, none is of --steps 9:"),
        (
            ["--export", "{}/page", "--limit", "1"],
            "--limit must be 4 or more, as groups are exported whole, got 1",
        ),
        (["--export", "{}/page", "--steps", "x"], "--steps must be A:B"),
        (["--export", str(ROOT)], "--export must name a new or an empty folder"),
        (["/nowhere"], "/nowhere must be the directory of a run, of a sweep or of an evaluation"),
    ],
)
def test_a_mistake_is_named(run, tmp_path, arguments, text):
    assert text in refused(run, *(argument.format(tmp_path) for argument in arguments))


def test_limits_of_an_export_need_an_export(run):
    assert "need --export" in refused(run, "--limit", "3", code=2)
