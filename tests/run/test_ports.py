"""A listening socket is there from the start, and a taken port is named."""

from __future__ import annotations

import socket

import pytest

from gymexp.errors import ConfigError
from gymexp.run import ports


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
