"""Who may ask a run's servers: whoever has the key, and in every other case nobody."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from loopback import serving

from gymexp.config.rules import problems_of
from gymexp.config.schema import EngineConfig, EnvConfig, ModelConfig, RunConfig
from gymexp.engine import vllm
from gymexp.engine.replicas import Replicas
from gymexp.gateway.engines import Engines
from gymexp.processes.access_keys import ENGINE, POLICY, RUN, Keys, fits, guard, header, header_of, required

ROOT = Path(__file__).parent.parent.parent
WRONG = [
    "",
    "Bearer ",
    "Bearer",
    "Bearer k",
    "Bearer keyy",
    "bearer key",
    "Basic key",
    "key",
    "Bearer k\xe9y",
]


def test_keys_are_long_differ_and_are_not_shown():
    one, other = Keys.new(), Keys.new()
    each = {one.run, one.policy, one.engine, other.run, other.policy, other.engine}
    assert len(each) == 6 and min(map(len, each)) == 43, "256 bits"
    assert not any(key in repr(one) for key in each)
    assert one.environ() == {RUN: one.run, POLICY: one.policy, ENGINE: one.engine}


def test_a_header_fits_its_own_key_alone():
    assert fits("Bearer key", "key")
    assert not any(fits(given, "key") for given in (None, *WRONG))


def test_every_path_takes_the_key_and_some_another_one_as_well():
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response()

    app = web.Application(middlewares=[guard("key", {"/v1/models": "other"})])
    app.add_routes([web.route("*", "/v1/models", answer), web.route("*", "/stats", answer)])

    async def story(url: str) -> dict[tuple[str, str | None], int]:
        found = {}
        async with aiohttp.ClientSession() as http:
            for path in ("/v1/models", "/stats", "/nothing", "/v1/models/", "//stats"):
                for key in ("key", "other", None):
                    async with http.post(url + path, headers=header(key)) as response:
                        found[path, key] = response.status
            for given in WRONG:
                async with http.get(f"{url}/stats", headers={"Authorization": given}) as response:
                    assert response.status == 401
        return found

    with serving(app) as url:
        found = asyncio.run(story(url))
    assert [path for (path, key), status in found.items() if status == 200 and key == "other"] == [
        "/v1/models"
    ]
    assert found["/v1/models", "key"] == found["/stats", "key"] == 200 and found["/nothing", "key"] == 404
    assert {status for (_, key), status in found.items() if key is None} == {401}
    assert sorted(asked) == ["/stats", "/v1/models", "/v1/models"]


@pytest.mark.parametrize(
    ("module", "arguments", "name"),
    [
        ("gymexp.gateway.server", ["--engine-url", "http://x", "--tokenizer", "x", "--port", "0"], RUN),
        ("gymexp.engine.hf.replica", ["config.yaml", "--fd", "0"], ENGINE),
    ],
)
def test_a_server_without_a_key_does_not_start(module, arguments, name, monkeypatch):
    for variable in (RUN, POLICY, ENGINE):
        monkeypatch.delenv(variable, raising=False)
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and f"{name} must be in the environment" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(SystemExit, match=name):
        required(name)
    assert header_of(name) == {}


def test_gateway_and_trainer_say_the_engines_key_to_engines(monkeypatch):
    monkeypatch.setenv(ENGINE, "key")
    heard: list[str | None] = []

    async def answer(request: web.Request) -> web.Response:
        heard.append(request.headers.get("Authorization"))
        return web.json_response({})

    async def through_the_gateway(url: str) -> None:
        engines = Engines((url,), 5.0)
        async for _ in engines.connect(web.Application()):
            assert await engines.ill() == {}

    app = web.Application()
    app.add_routes([web.route("*", "/{any:.*}", answer)])
    with serving(app) as url:
        replicas = Replicas([url], timeout_s=5.0)
        replicas.post("/pause")
        assert replicas.ill() == {}
        asyncio.run(through_the_gateway(url))
    assert heard == ["Bearer key"] * 3


async def asked_of_vllm(scope: dict[str, Any]) -> list[dict[str, Any]]:
    """What the middleware sends, or [] where it lets in."""
    from gymexp_key import DemandsKey  # pyright: ignore[reportMissingImports]

    sent: list[dict[str, Any]] = []
    let_in: list[bool] = []

    async def app(*_: Any) -> None:
        let_in.append(True)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await DemandsKey(app)(scope, None, send)
    assert bool(let_in) != bool(sent)
    return sent


def test_vllm_lets_nobody_in_by_any_path_without_the_engines_key(monkeypatch):
    monkeypatch.syspath_prepend(vllm.IN_VLLM)
    monkeypatch.setenv(ENGINE, "key")
    right = [(b"host", b"x"), (b"authorization", b"Bearer key")]
    wrong = [[], [*right, (b"authorization", b"Bearer guess")]]
    wrong += [[(b"authorization", given.encode("latin-1"))] for given in WRONG]
    for path in ("/health", "/v1/models", "/collective_rpc", "/metrics", "/", "/docs"):
        for method in ("GET", "POST", "OPTIONS"):
            scope = {"type": "http", "path": path, "method": method}
            assert asyncio.run(asked_of_vllm(scope | {"headers": right})) == []
            for headers in wrong:
                first, _ = asyncio.run(asked_of_vllm(scope | {"headers": headers}))
                assert first["status"] == 401
    [closed] = asyncio.run(asked_of_vllm({"type": "websocket", "path": "/v1/realtime", "headers": []}))
    assert closed["type"] == "websocket.close"
    assert asyncio.run(asked_of_vllm({"type": "lifespan"})) == []


def test_vllm_unpickles_for_cuda_ipc_alone_and_demands_no_key_of_the_users_other_servers():
    name = "VLLM_ALLOW_INSECURE_SERIALIZATION"
    unpickles = {way: vllm.environment(way)[name] for way in ("nccl", "ipc", "disk")}
    assert unpickles == {"nccl": "0", "ipc": "1", "disk": "0"}
    assert vllm.environment("disk")["VLLM_API_KEY"] == ""


@pytest.mark.parametrize("flag", ["middleware", "uds", "api-key"])
def test_flags_that_would_open_vllm_or_close_it_to_the_gateway_are_refused(flag):
    engine = EngineConfig(args={flag: "x"})
    config = RunConfig("n", model=ModelConfig("m", "p"), env={"e": EnvConfig("c", "a")}, engine=engine)
    assert any(f"engine.args.{flag}" in problem for problem in problems_of(config))
