"""A run has a gateway for each model server, each on a socket and with a log of its own."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from whole_run import TINY

from gymexp.cluster.placement import Placement, Share
from gymexp.config.schema import GymConfig, ModelConfig, RunConfig
from gymexp.errors import ConfigError
from gymexp.processes import ports
from gymexp.processes.access_keys import Keys
from gymexp.processes.supervisor import Service
from gymexp.record.directory import RunDirectory
from gymexp.run import services
from gymexp.run.work import TRAINING, Work, evaluation

ENGINES = ["http://e0", "http://e1"]
SERVERS = Placement("hf", replicas=[Share(0, [])], training=[Share(0, [])])


def configured(model_servers: int, **gym: Any) -> RunConfig:
    made = GymConfig(model_servers=model_servers, **gym)
    return RunConfig(model=ModelConfig("tiny", str(TINY)), gym=made)


def opened(config: RunConfig, work: Work = TRAINING) -> list[socket.socket]:
    return services.listen_for_gateways(config, work, "127.0.0.1")


def commands(tmp_path: Path, monkeypatch: Any, config: RunConfig, socks: list) -> tuple[list[Service], list]:
    started: list[tuple[list[str], Path, list[int]]] = []

    async def note(command: list[str], log: Path, _: Any, fds: list[int]) -> None:
        started.append((command[3:], log, fds))

    monkeypatch.setattr(services, "spawn", note)
    made = services.gateways(config, SERVERS, RunDirectory(tmp_path), socks, ENGINES, Keys.new(), TRAINING)
    for service in made:
        asyncio.run(service.start())
    return made, started


def test_one_gateway_is_started_as_ever(tmp_path, monkeypatch):
    config = configured(1)
    [sock] = opened(config)
    [service], [(command, log, fds)] = commands(tmp_path, monkeypatch, config, [sock])
    assert service.name == "gateway" and log == tmp_path / "logs" / "gateway.log" == service.log
    assert command == [
        *("--engine-url", "http://e0", "--engine-url", "http://e1"),
        *("--tokenizer", str(TINY), "--max-model-len", str(config.model.max_model_len)),
        *("--hold", "--fd", str(sock.fileno())),
    ]
    assert fds == [sock.fileno()]
    sock.close()


def test_each_of_several_has_its_socket_and_log_and_knows_that_it_is_one_of_several(tmp_path, monkeypatch):
    config = configured(3)
    socks = opened(config)
    made, started = commands(tmp_path, monkeypatch, config, socks)
    names = ["gateway", "gateway-1", "gateway-2"]
    assert [service.name for service in made] == names
    assert [service.url for service in made] == [ports.url_of(sock) for sock in socks]
    assert len({service.url for service in made}) == 3
    for (command, log, fds), name, sock in zip(started, names, socks, strict=True):
        assert command[-3:] == ["--one-of-several", "--fd", str(sock.fileno())]
        assert log.name == f"{name}.log" and fds == [sock.fileno()]
        sock.close()


def test_a_policy_that_is_text_alone_has_one_gateway():
    text = evaluation([0], ("endpoint", "http://x/v1"))
    for work, count in ((text, 1), (evaluation([0]), 2)):
        socks = opened(configured(2), work)
        assert len(socks) == count
        for sock in socks:
            sock.close()


def test_a_port_that_is_given_is_the_first_gateways_and_is_named_if_it_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"gym\.policy_port must be a free port .* {port} is in use"):
            opened(configured(1, policy_port=port))
