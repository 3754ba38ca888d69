"""Which servers a run has, under which names, and that the real ones start, end and come back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from real_servers import Servers

from gymexp.config.schema import EnvConfig, GymConfig
from gymexp.errors import ConfigError, ServiceError
from gymexp.gym.install import site_packages
from gymexp.gym.server_plan import Layout, plan

SUDOKU = EnvConfig(
    config_path="resources_servers/reasoning_gym/configs/reasoning_gym.yaml",
    agent="reasoning_gym_simple_agent",
    max_steps=1,
)
WORKPLACE = EnvConfig(
    config_path="resources_servers/workplace_assistant/configs/workplace_assistant.yaml",
    agent="workplace_assistant_simple_agent",
    replicas=2,
)
# An agent with a list of servers, one of which refers to a judge; and one server that nobody needs.
OWN = """
judge:
  resources_servers:
    judge_kind: {entrypoint: app.py, model: {type: responses_api_models, name: policy_model}}
rooms:
  resources_servers:
    rooms_kind: {entrypoint: server.py, judge: {type: resources_servers, name: judge}}
idle:
  resources_servers:
    rooms_kind: {entrypoint: server.py}
walker:
  responses_api_agents:
    walker_kind:
      entrypoint: app.py
      servers: [{type: resources_servers, name: rooms}, {type: responses_api_models, name: policy_model}]
      datasets: [{name: train}]
"""


GATEWAYS = ["http://127.0.0.1:4000", "http://127.0.0.1:4001"]


def planned(
    envs: dict[str, EnvConfig], site: Path, policy_urls: Sequence[str] = GATEWAYS[:1], **gym
) -> Layout:
    given: list[str] = []

    def port(name: str) -> int:
        given.append(name)
        return 5000 + len(given)

    return plan(envs, GymConfig(**gym), site, policy_urls, port)


@pytest.fixture
def own_site(tmp_path: Path) -> Path:
    (tmp_path / "own.yaml").write_text(OWN)
    return tmp_path


def own(**settings) -> dict[str, EnvConfig]:
    return {"own": EnvConfig(config_path="own.yaml", agent="walker", **settings)}


def test_with_auto_an_environment_may_have_a_replica_a_core_of_which_one_starts(own_site, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    layout = planned(own(replicas="auto"), own_site, model_servers=2)
    assert [replica.spare for replica in layout.replicas["own"]] == [False, True, True]
    servers = ("own-judge", "own-rooms", "own-walker")
    assert layout.spares == {f"{name}-{index}" for name in servers for index in (1, 2)}
    assert planned(own(replicas=3), own_site).spares == set()


def test_an_environment_is_its_agent_and_every_server_it_leads_to(own_site):
    layout = planned(own(), own_site)
    assert layout.modules == {
        "policy_model": "responses_api_models.vllm_model.app",
        "own-judge": "resources_servers.judge_kind.app",
        "own-rooms": "resources_servers.rooms_kind.server",
        "own-walker": "responses_api_agents.walker_kind.app",
    }
    walker = layout.config["own-walker"]["responses_api_agents"]["walker_kind"]
    assert [one["name"] for one in walker["servers"]] == ["own-rooms", "policy_model"]
    assert "datasets" not in walker
    rooms = layout.config["own-rooms"]["resources_servers"]["rooms_kind"]
    assert rooms["judge"]["name"] == "own-judge"


def test_the_model_server_asks_the_gateway_for_token_ids(own_site):
    model = planned(own(), own_site).config["policy_model"]["responses_api_models"]["vllm_model"]
    assert model["base_url"] == "http://127.0.0.1:4000/v1"
    assert model["return_token_id_information"] is True


def test_replicas_share_nothing_but_the_model_servers(own_site):
    layout = planned(own(replicas=3), own_site, model_servers=2)
    assert [replica.services for replica in layout.replicas["own"]] == [
        [f"own-{name}-{i}" for name in ("judge", "rooms", "walker")] + [model]
        for i, model in enumerate(["policy_model", "policy_model-1", "policy_model"])
    ]
    second = layout.config["own-walker-1"]["responses_api_agents"]["walker_kind"]
    assert [one["name"] for one in second["servers"]] == ["own-rooms-1", "policy_model-1"]
    used = [
        values["port"]
        for name, entry in layout.config.items()
        if name != "head_server"
        for kind in entry.values()
        for values in kind.values()
    ]
    assert len(used) == len(set(used)) == 3 * 3 + 2
    urls = [replica.url for replica in layout.replicas["own"]]
    assert len(set(urls)) == 3


def model_url(layout: Layout, name: str) -> str:
    return layout.config[name]["responses_api_models"]["vllm_model"]["base_url"]


def test_each_model_server_asks_a_gateway_of_its_own_and_a_replica_reaches_it_alone(own_site):
    env = own(replicas=3, servers={"walker": {"asks": "${policy_base_url}"}})
    layout = planned(env, own_site, GATEWAYS, model_servers=2)
    assert [model_url(layout, name) for name in ("policy_model", "policy_model-1")] == [
        "http://127.0.0.1:4000/v1",
        "http://127.0.0.1:4001/v1",
    ]
    for replica in layout.replicas["own"]:
        [model] = [name for name in replica.services if name.startswith("policy_model")]
        reached = GATEWAYS[replica.gateway] + "/v1"
        assert model_url(layout, model) == reached
        asked = [
            values["asks"]
            for name in replica.services
            for kind in layout.config[name].values()
            for values in kind.values()
            if "asks" in values
        ]
        assert asked == [reached], "what asks the policy without the model server asks the same gateway"
    assert [replica.gateway for replica in layout.replicas["own"]] == [0, 1, 0]


def test_model_servers_share_a_gateway_if_there_is_one(own_site):
    layout = planned(own(replicas=2), own_site, GATEWAYS[:1], model_servers=2)
    assert {model_url(layout, name) for name in ("policy_model", "policy_model-1")} == {
        "http://127.0.0.1:4000/v1"
    }
    assert {replica.gateway for replica in layout.replicas["own"]} == {0}


def test_two_environments_of_one_file_do_not_meet(own_site):
    envs = own() | {"other": own(max_steps=9)["own"]}
    layout = planned(envs, own_site)
    assert {"own-walker", "other-walker"} <= layout.modules.keys()
    agents = {name: layout.config[f"{name}-walker"]["responses_api_agents"]["walker_kind"] for name in envs}
    assert "max_steps" not in agents["own"]
    assert agents["other"]["max_steps"] == 9


def test_a_file_in_the_working_directory_goes_before_nemo_gyms(own_site, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    (here / "own.yaml").write_text(OWN.replace("walker_kind", "my_kind"))
    monkeypatch.chdir(here)
    assert planned(own(), own_site).modules["own-walker"] == "responses_api_agents.my_kind.app"


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (
            EnvConfig(config_path="own.yaml", agent="walkr"),
            r"own\.agent must be an agent of own\.yaml, got 'walkr'; did you mean walker\?.*agents: walker",
        ),
        (
            EnvConfig(config_path="own.yaml", agent="judge"),
            r"env\.own\.agent must be an agent of own\.yaml, got 'judge'",
        ),
        (
            EnvConfig(config_path="owm.yaml", agent="walker"),
            r"env\.own\.config_path: owm\.yaml is neither in ",
        ),
        (
            EnvConfig(config_path="torn.yaml", agent="walker"),
            r"walker refers to the server hall, which",
        ),
    ],
)
def test_a_wrong_name_is_answered_with_what_there_is(env, said, own_site, monkeypatch):
    monkeypatch.chdir(own_site)
    (own_site / "torn.yaml").write_text(OWN.replace("name: rooms}", "name: hall}"))
    with pytest.raises(ConfigError, match=said):
        planned({"own": env}, own_site)


@pytest.mark.gym
def test_both_environments_of_nemo_gym_are_laid_out(gym_python):
    layout = planned({"sudoku": SUDOKU, "workplace": WORKPLACE}, site_packages(gym_python))
    assert list(layout.modules) == [
        "policy_model",
        "sudoku-reasoning_gym",
        "sudoku-reasoning_gym_simple_agent",
        "workplace-workplace_assistant-0",
        "workplace-workplace_assistant_simple_agent-0",
        "workplace-workplace_assistant-1",
        "workplace-workplace_assistant_simple_agent-1",
    ]
    sudoku = layout.config["sudoku-reasoning_gym_simple_agent"]["responses_api_agents"]["simple_agent"]
    assert (sudoku["max_steps"], sudoku["resources_server"]["name"]) == (1, "sudoku-reasoning_gym")
    name = "workplace-workplace_assistant_simple_agent-1"
    second = layout.config[name]["responses_api_agents"]["simple_agent"]
    assert second["resources_server"]["name"] == "workplace-workplace_assistant-1"
    assert second["max_steps"] == 6, "NeMo Gym's own, as env.workplace.max_steps is None here"
    assert layout.replicas["workplace"][1].url == f"http://127.0.0.1:{second['port']}"


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as response:
        return response.read()


BROKEN = """
world:
  resources_servers:
    example_single_tool_call: {entrypoint: app.py, domain: agent}
broken:
  responses_api_agents:
    simple_agent:
      entrypoint: app.py
      max_steps: many
      resources_server: {type: resources_servers, name: world}
      model_server: {type: responses_api_models, name: policy_model}
"""


@pytest.mark.gym
def test_the_real_servers_start_answer_and_come_back_after_a_kill_while_a_broken_one_is_named(
    gym_python, tmp_path
):
    (tmp_path / "broken.yaml").write_text(BROKEN)
    envs = {
        "sudoku": SUDOKU,
        "workplace": WORKPLACE,
        "x": EnvConfig(config_path=str(tmp_path / "broken.yaml"), agent="broken"),
    }
    pids: list[int] = []

    async def story() -> None:
        with ExitStack() as stack:
            site = site_packages(gym_python)
            servers = Servers(
                lambda port: plan(envs, GymConfig(), site, ["http://127.0.0.1:9"], port),
                gym_python,
                tmp_path,
                stack,
            )
            supervisor = servers.supervisor
            try:
                with pytest.raises(ServiceError) as caught:
                    await asyncio.wait_for(asyncio.shield(supervisor.failed), 120)
                assert str(caught.value).startswith("x-broken exited with code 1. ")
                assert "max_steps" in str(caught.value), "the log's end says what was wrong"

                good = [name for name in servers.names if name != "x-broken"]
                while any(supervisor.services[name].state != "ready" for name in good):
                    await asyncio.sleep(0.05)
                for name in good:
                    url = supervisor.services[name].url
                    assert b'"ok"' in await asyncio.to_thread(get, f"{url}/")
                pids.extend(s.pid for s in supervisor.services.values() if s.pid)

                victim = supervisor.services["workplace-workplace_assistant-0"]
                assert victim.pid is not None
                began = time.monotonic()
                os.kill(victim.pid, signal.SIGKILL)
                while victim.epoch == 0 or victim.state != "ready":
                    await asyncio.sleep(0.02)
                    assert time.monotonic() - began < 20
                host = supervisor.services["gym-host"].pid
                assert psutil.Process(victim.pid).ppid() == host, "a fork, not ten seconds of imports"
                assert b'"ok"' in await asyncio.to_thread(get, f"{victim.url}/")
                pids.append(victim.pid)
            finally:
                await supervisor.close()

    asyncio.run(asyncio.wait_for(story(), 200))
    assert len(pids) >= 8
    until = time.monotonic() + 10  # the kernel ends the servers with their host, and init buries them
    while (left := [pid for pid in pids if not _gone(pid)]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


@pytest.mark.gym
def test_a_server_whose_module_cannot_be_imported_is_named_and_the_others_start(gym_python, tmp_path):
    (tmp_path / "gone.yaml").write_text(
        "gone:\n  responses_api_agents:\n    simple_agent: {entrypoint: no_such_file.py}\n"
    )
    envs = {"x": EnvConfig(config_path=str(tmp_path / "gone.yaml"), agent="gone"), "sudoku": SUDOKU}

    async def story() -> None:
        with ExitStack() as stack:
            servers = Servers(
                lambda port: plan(envs, GymConfig(), site_packages(gym_python), ["http://127.0.0.1:9"], port),
                gym_python,
                tmp_path,
                stack,
            )
            try:
                with pytest.raises(ServiceError, match=r"No module named '.*no_such_file'") as caught:
                    await servers.supervisor.wait_ready(servers.names, 120)
                assert str(caught.value).startswith("env.x cannot start: its server x-gone cannot be")
                assert str(tmp_path / "x-gone.log") in str(caught.value)
                while servers.supervisor.services["sudoku-reasoning_gym"].state != "ready":
                    await asyncio.sleep(0.05)
            finally:
                await servers.supervisor.close()

    asyncio.run(asyncio.wait_for(story(), 150))


MY_SERVER = """
from nemo_gym.base_resources_server import (
    BaseResourcesServerConfig, BaseVerifyRequest, BaseVerifyResponse, SimpleResourcesServer,
)

class Mine(SimpleResourcesServer):
    config: BaseResourcesServerConfig

    def setup_webserver(self):
        app = super().setup_webserver()
        app.get("/mine")(lambda: "from the working directory")
        return app

    async def verify(self, body: BaseVerifyRequest) -> BaseVerifyResponse:
        return BaseVerifyResponse(**body.model_dump(), reward=1.0)
"""
MY_CONFIG = """
mine:
  resources_servers:
    mine: {entrypoint: app.py, domain: other}
mine_agent:
  responses_api_agents:
    simple_agent:
      entrypoint: app.py
      resources_server: {type: resources_servers, name: mine}
      model_server: {type: responses_api_models, name: policy_model}
"""


@pytest.mark.gym
def test_a_server_in_the_working_directory_runs_beside_nemo_gyms(gym_python, tmp_path, monkeypatch):
    folder = tmp_path / "resources_servers" / "mine"
    (folder / "configs").mkdir(parents=True)
    (folder / "app.py").write_text(MY_SERVER)
    (folder / "configs" / "mine.yaml").write_text(MY_CONFIG)
    monkeypatch.chdir(tmp_path)
    env = EnvConfig(config_path="resources_servers/mine/configs/mine.yaml", agent="mine_agent")

    async def story() -> bytes:
        with ExitStack() as stack:
            site = site_packages(gym_python)
            servers = Servers(
                lambda port: plan({"x": env}, GymConfig(), site, ["http://127.0.0.1:9"], port),
                gym_python,
                tmp_path,
                stack,
            )
            try:
                await servers.supervisor.wait_ready(servers.names, 120)
                url = servers.supervisor.services["x-mine"].url
                return await asyncio.to_thread(get, f"{url}/mine")
            finally:
                await servers.supervisor.close()

    assert b"from the working directory" in asyncio.run(asyncio.wait_for(story(), 150))


def _gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
