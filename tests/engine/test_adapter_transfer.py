"""Adapters on their way to replicas that refuse a name twice, as vLLM does, and that may break off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from aiohttp import web
from loopback import serving

from gymexp.config.schema import LoraConfig
from gymexp.engine.adapter import name_of
from gymexp.engine.adapter_transfer import AdapterTransfer
from gymexp.engine.replicas import Replicas


class Vllm:
    """A vLLM as far as adapters go. breaks: whether it breaks the connection off once it has loaded one."""

    def __init__(self) -> None:
        self.loaded: dict[str, Path] = {}
        self.asked: list[tuple[str, str]] = []
        self.breaks = False

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.post("/v1/load_lora_adapter", self.load)])
        app.add_routes([web.post("/v1/unload_lora_adapter", self.unload)])
        return app

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, path = body["lora_name"], Path(body["lora_path"])
        self.asked.append(("load", name))
        if name in self.loaded:
            return web.Response(status=400, text=f"the adapter {name} has been loaded already")
        assert (path / "adapter_model.safetensors").exists()
        self.loaded[name] = path
        if self.breaks:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(text="Success")

    async def unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.asked.append(("unload", name))
        return web.Response(status=200 if self.loaded.pop(name, None) else 404)


@pytest.fixture
def vllm() -> Iterator[tuple[Vllm, Replicas]]:
    server = Vllm()
    with serving(server.app()) as url:
        yield server, Replicas([url], 10.0)


def adapter() -> Iterator[tuple[str, torch.Tensor]]:
    return iter([("w.lora_A.weight", torch.ones(2))])


def test_a_replica_has_one_version_and_is_asked_to_unload_that_alone(vllm, tmp_path):
    server, replicas = vllm
    transfer = AdapterTransfer(tmp_path / "adapters", LoraConfig(r=2))
    for version in range(4):
        transfer.send(replicas, version, [], adapter())
        assert server.loaded == {name_of(version): tmp_path / "adapters" / str(version)}
        assert [path.name for path in (tmp_path / "adapters").iterdir()] == [str(version)]
    changes = [pair for n in range(3) for pair in (("unload", name_of(n)), ("load", name_of(n + 1)))]
    assert server.asked == [("load", name_of(0)), *changes]
    transfer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_replica_that_broke_off_as_it_loaded_a_version_gets_it_again(vllm, tmp_path):
    server, replicas = vllm
    transfer = AdapterTransfer(tmp_path / "adapters", LoraConfig(r=2))
    transfer.send(replicas, 0, [], adapter())
    url, server.breaks = replicas.urls[0], True
    transfer.send(replicas, 1, [], adapter())
    assert replicas.urls == [] and list(replicas.lost) == [url]
    server.breaks = False
    back = replicas.only([url])
    assert transfer.again(back, 1) and back.urls == [url]
    assert list(server.loaded) == [name_of(1)]
    server.loaded.clear()  # it was started again
    assert transfer.again(back, 1) and list(server.loaded) == [name_of(1)]
