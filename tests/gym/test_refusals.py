"""Whose doing an error of the real NeMo Gym is: the policy's, the row's or a server's."""

from __future__ import annotations

import asyncio
import re
from contextlib import ExitStack

import aiohttp
import pytest
from loopback import serving
from real_servers import Servers, policy_that_says

from gymexp.config.schema import EnvConfig, GymConfig
from gymexp.gym.install import site_packages
from gymexp.gym.server_plan import plan
from gymexp.record.services_file import Replica
from gymexp.rollout.outcome import Rollout, Task
from gymexp.rollout.play import RolloutFailure, Sampling, play

pytestmark = pytest.mark.gym
SERVER = r"""
from fastapi import HTTPException
from nemo_gym.base_resources_server import (
    BaseResourcesServerConfig, BaseVerifyRequest, BaseVerifyResponse, SimpleResourcesServer,
)
from pydantic import field_validator

class Answered(BaseVerifyRequest):
    how: str
    level: int

    @field_validator("response")
    @classmethod
    def readable(cls, response):
        if (response.metadata or {}).get("picky"):
            raise ValueError("no action in the answer")
        return response

class Strict(SimpleResourcesServer):
    config: BaseResourcesServerConfig

    def setup_webserver(self):
        app = super().setup_webserver()

        @app.post("/close_session")
        async def close(body: dict):
            return {"resources_session_id": body["resources_session_id"]}

        return app

    async def seed_session(self, body: dict):
        if (body.get("task_data") or body)["how"] == "seed":
            raise HTTPException(status_code=400, detail="no such level")
        return {key: body[key] for key in ("resources_session_id",) if key in body}

    async def verify(self, body: Answered) -> BaseVerifyResponse:
        if body.how.isdigit():
            raise HTTPException(status_code=int(body.how), detail="no action in the answer")
        if body.how == "crash":
            raise RuntimeError("out of order")
        if body.how == "loud":
            raise RuntimeError("ü" * 5000 + "\r\nx-other: header")
        return BaseVerifyResponse(**body.model_dump(), reward=1.0)
"""
CONFIG = """
strict:
  resources_servers:
    strict: {entrypoint: app.py, domain: other}
strict_agent:
  responses_api_agents:
    simple_agent:
      entrypoint: app.py
      max_steps: 1
      resources_server: {type: resources_servers, name: strict}
      model_server: {type: responses_api_models, name: policy_model}
"""
# The same behind an environment server that takes typed episodes; of NeMo Gym 0.7.
TYPED = """
config_paths: [environment_servers/single_agent_turn_legacy/configs/single_agent_turn_legacy.yaml]
strict_turn:
  _inherit_from: single_agent_turn_legacy
  environment_servers:
    single_agent_turn_legacy:
      resources_server: {type: resources_servers, name: strict}
      agent_server: {type: responses_api_agents, name: strict_agent}
"""
ENV = EnvConfig(config_path="resources_servers/strict/configs/strict.yaml", agent="strict_agent")
ROWS = {
    "400": {"how": "400", "level": 1},
    "422": {"how": "422", "level": 1},
    "picky": {
        "responses_create_params": {"input": "Move.", "metadata": {"picky": "yes"}},
        "how": "",
        "level": 1,
    },
    "500": {"how": "500", "level": 1},
    "503": {"how": "503", "level": 1},
    "404": {"how": "404", "level": 1},
    "crash": {"how": "crash", "level": 1},
    "loud": {"how": "loud", "level": 1},
    "seed": {"how": "seed", "level": 1},
    "row": {"how": "fine", "level": "high"},
    "fine": {"how": "fine", "level": 1},
}


@pytest.fixture(scope="module", params=["agent", "environment server"])
def outcomes(request, gym_python, tmp_path_factory) -> dict:
    typed = request.param == "environment server"
    if typed and not (site_packages(gym_python) / "environment_servers").is_dir():
        pytest.skip("say --gym-version 0.7.0")
    own = tmp_path_factory.mktemp("own")
    folder = own / "resources_servers" / "strict"
    (folder / "configs").mkdir(parents=True)
    (folder / "app.py").write_text(SERVER)
    (folder / "configs" / "strict.yaml").write_text(CONFIG + TYPED * typed)

    async def one(http: aiohttp.ClientSession, replica: Replica, row: dict):
        row = {"responses_create_params": {"input": "Move."}} | row
        task = Task("strict/train/0", "strict", "strict_agent", row)
        sampling = Sampling(temperature=1.0, max_output_tokens=8, seed=1)
        try:
            more = sampling, 60.0, 100, 1, -0.5, replica.takes_episodes
            return (await play(http, replica.url, task, *more)).rollout
        except RolloutFailure as failure:
            return failure

    async def story(policy: str) -> dict:
        with ExitStack() as stack:
            site = site_packages(gym_python)
            servers = Servers(
                lambda port: plan({"strict": ENV}, GymConfig(), site, [policy], port, python=gym_python),
                gym_python,
                own,
                stack,
            )
            try:
                await servers.supervisor.wait_ready(servers.names, 120)
                [replica] = servers.layout.replicas["strict"]
                assert replica.takes_episodes == typed
                async with aiohttp.ClientSession() as http:
                    return {name: await one(http, replica, row) for name, row in ROWS.items()}
            finally:
                await servers.supervisor.close()

    with pytest.MonkeyPatch.context() as patch, serving(policy_that_says("I rest.")) as policy:
        patch.chdir(own)
        return asyncio.run(asyncio.wait_for(story(policy), 300))


@pytest.mark.parametrize(("name", "status"), [("400", 400), ("422", 422), ("picky", 422)])
def test_a_400_or_422_to_the_policys_answer_is_its_own_doing_and_keeps_its_tokens(name, status, outcomes):
    rollout = outcomes[name]
    assert isinstance(rollout, Rollout), rollout
    assert rollout.reward == -0.5 and f"/verify answered {status}" in rollout.refused
    assert "no action in the answer" in rollout.refused
    assert [(turn.prompt_ids, turn.completion_ids) for turn in rollout.turns] == [([1, 2], [3, 4])]


@pytest.mark.parametrize("name", ["500", "503", "404", "crash", "loud", "seed", "row"])
def test_what_is_no_answer_to_the_policy_stays_a_failure_of_the_environment(name, outcomes):
    assert isinstance(outcomes[name], RolloutFailure), outcomes[name]
    assert outcomes[name].cause == "environment"


@pytest.mark.parametrize(
    ("name", "server", "said"),
    [
        ("500", "strict-strict", r"/verify answered 500: .*no action in the answer"),
        ("crash", "strict-strict", r"RuntimeError: out of order \(.*resources_servers/strict/app\.py:\d+\)"),
        ("loud", "strict-strict", r"RuntimeError: ü{1000} \(.*app\.py:\d+\)"),
        ("seed", "strict-strict", r"/seed_session answered 400: .*no such level"),
        ("row", "strict-strict", r"/verify answered 422: .*level"),
    ],
)
def test_a_failure_names_the_server_that_failed_not_the_agent_that_asked_it(name, server, said, outcomes):
    assert outcomes[name].server == server
    assert re.fullmatch(rf"{server}: {said}.*", outcomes[name].detail, re.DOTALL), outcomes[name].detail
    assert "Traceback" not in outcomes[name].detail


def test_an_answer_that_is_scored_has_the_servers_reward(outcomes):
    assert (outcomes["fine"].reward, outcomes["fine"].refused) == (1.0, "")
