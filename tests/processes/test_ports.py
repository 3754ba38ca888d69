"""A listening socket is there from the start, and a taken port is named."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import sys

import pytest

from gymexp.engine import vllm
from gymexp.errors import ConfigError
from gymexp.processes import ports


def test_a_connection_made_before_anyone_serves_waits_in_the_queue():
    with ports.listen() as sock:
        client = socket.create_connection(sock.getsockname(), timeout=5)
        served, _ = sock.accept()
        served.sendall(b"late but served")
        assert client.recv(64) == b"late but served"


def test_a_port_in_use_names_the_setting_and_the_port():
    with ports.listen() as taken:
        number = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"gym\.policy_port must be a free port.*{number} is in use"):
            ports.listen(port=number, key="gym.policy_port")


TAKE = """
import encodings.idna, os, socket, sys
port, uid = map(int, sys.argv[1:])
os.setgroups([]), os.setgid(uid), os.setuid(uid)
for options in ([], [socket.SO_REUSEADDR], [socket.SO_REUSEPORT], [socket.SO_REUSEADDR, socket.SO_REUSEPORT]):
    for host in ("127.0.0.1", "0.0.0.0"):
        with socket.socket() as sock:
            for option in options:
                sock.setsockopt(socket.SOL_SOCKET, option, 1)
            try:
                sock.bind((host, port))
                sock.listen()
            except OSError:
                continue
            sys.exit("taken")
"""


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="becomes another user")
def test_nobody_else_takes_the_port_that_is_kept_for_vllm(monkeypatch):
    monkeypatch.syspath_prepend(vllm.IN_VLLM)
    from gymexp_serve import share_port  # pyright: ignore[reportMissingImports]

    nobody = pwd.getpwnam("nobody").pw_uid
    with ports.reserve() as kept:
        port = kept.getsockname()[1]
        taking = [sys.executable, "-c", TAKE, str(port), str(nobody)]
        assert subprocess.run(taking, check=False).returncode == 0
        monkeypatch.setattr(socket.socket, "bind", socket.socket.bind)
        share_port(port)
        with socket.socket() as own:  # as vLLM with one API server opens it
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.bind(("127.0.0.1", port))
            own.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                pass
