"""Aviary's environments, whose rows have an empty input: NeMo Gym's agent takes the first prompt and the
tools from the environment's reset. The environment is aviary's own of gsm8k, with tasks of the test's, as
those of the Hugging Face hub need a network."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from loopback import serving
from real_servers import Servers
from whole_run import NO_WAY_OUT, PATIENCE_S, rollouts_of

from gymexp.config.schema import EnvConfig, GymConfig
from gymexp.errors import ConfigError
from gymexp.gym.definitions import ensure_environments, playable_servers
from gymexp.gym.install import site_packages
from gymexp.gym.server_plan import plan
from gymexp.record.places import cache_dir
from gymexp.rollout.outcome import Completed, Task
from gymexp.rollout.play import RolloutFailure, Sampling, play

pytestmark = pytest.mark.gym
APP = """
from aviary.core import TaskDataset
from aviary.envs.gsm8k import CalculatorEnv
from pydantic import Field
from resources_servers.aviary.app import AviaryResourcesServer

class Sums(TaskDataset):
    def get_new_env_by_idx(self, idx):
        return CalculatorEnv(problem_id=str(idx), problem=f"What is {idx} + 40?", answer=idx + 40)

    def __len__(self):
        return 4

class SumsServer(AviaryResourcesServer):
    dataset: TaskDataset = Field(default_factory=Sums)
"""
CONFIG = """
sums:
  resources_servers:
    sums: {entrypoint: app.py, domain: math}
sums_agent:
  responses_api_agents:
    aviary_agent:
      entrypoint: app.py
      max_steps: 3
      resources_server: {type: resources_servers, name: sums}
      model_server: {type: responses_api_models, name: policy_model}
"""
ENV = EnvConfig(config_path="resources_servers/sums/configs/sums.yaml", agent="sums_agent")
SAMPLING = Sampling(temperature=1.0, max_output_tokens=64, seed=1, play="p")


@pytest.fixture
def own(tmp_path: Path, monkeypatch) -> Path:
    """The working directory, with the environment in NeMo Gym's layout."""
    folder = tmp_path / "resources_servers" / "sums"
    rows = [{"task_idx": index, "responses_create_params": {"input": []}} for index in range(4)]
    files = {
        "app.py": APP,
        "configs/sums.yaml": CONFIG,
        "requirements.txt": "fhaviary[gsm8k]>=0.28.0\n",
        "data/example.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def policy(asked: list[dict[str, Any]], breaks: bool) -> web.Application:
    """Asks the calculator and submits what it says; or is gone after the first turn."""

    def call(name: str, **arguments: str) -> dict[str, Any]:
        function = {"name": name, "arguments": json.dumps(arguments)}
        return {"id": f"call-{name}", "type": "function", "function": function}

    async def complete(request: web.Request) -> web.Response:
        asked.append(body := await request.json())
        said = [message["content"] for message in body["messages"] if message["role"] == "tool"]
        if said and breaks:
            return web.json_response({"error": {"message": "gone"}}, status=500)
        one = call("submit_answer", answer=said[0]) if said else call("calculator", expr="2 + 40")
        ids = ([1, 2, 3, 4, 5], [6]) if said else ([1, 2], [3, 4])
        message = {"role": "assistant", "content": None, "tool_calls": [one]}
        message |= {"prompt_token_ids": ids[0], "generation_token_ids": ids[1]}
        message |= {"generation_log_probs": [-0.5] * len(ids[1])}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls", "logprobs": None}
        about = {"id": "c", "object": "chat.completion", "created": 1, "model": "policy"}
        return web.json_response(about | {"choices": [choice]})

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", complete)])
    return app


@pytest.fixture(params=["whole", "broken"])
def played(request, own: Path, gym_python: Path) -> tuple[Any, list[dict[str, Any]]]:
    """What a task ends as, and the requests that the policy got."""
    asked: list[dict[str, Any]] = []
    python = ensure_environments(GymConfig(), {"sums": ENV}, cache_dir(), print)
    row = {"task_idx": 2, "responses_create_params": {"input": []}}

    async def story(url: str, stack: ExitStack) -> Any:
        site = site_packages(gym_python)
        servers = Servers(
            lambda port: plan({"sums": ENV}, GymConfig(), site, [url], port), python, own, stack
        )
        try:
            await servers.supervisor.wait_ready(servers.names, 120)
            [replica] = servers.layout.replicas["sums"]
            task = Task("t", "sums", replica.agent, row)
            async with aiohttp.ClientSession() as http:
                return await play(http, replica.url, task, SAMPLING, 60.0, 10, replica.max_steps, 0.0)
        except RolloutFailure as failure:
            return failure
        finally:
            await servers.supervisor.close()

    with ExitStack() as stack:
        url = stack.enter_context(serving(policy(asked, request.param == "broken")))
        return asyncio.run(asyncio.wait_for(story(url, stack), 200)), asked


@pytest.mark.parametrize("played", ["whole"], indirect=True)
def test_the_agent_begins_with_what_the_environment_says_and_the_episode_is_whole(played):
    outcome, asked = played
    assert isinstance(outcome, Completed) and outcome.rollout.reward == 1.0
    assert [message["content"] for message in asked[0]["messages"]] == ["What is 2 + 40?"]
    assert {tool["function"]["name"] for tool in asked[0]["tools"]} == {"calculator", "submit_answer"}
    assert [(turn.prompt_ids, turn.completion_ids) for turn in outcome.rollout.turns] == [
        ([1, 2], [3, 4]),
        ([1, 2, 3, 4, 5], [6]),
    ]


@pytest.mark.parametrize("played", ["broken"], indirect=True)
def test_an_engine_that_fails_within_the_episode_gives_no_reward(played):
    outcome, _ = played
    assert isinstance(outcome, RolloutFailure) and "/v1/chat/completions answered 500" in outcome.detail


def test_a_list_of_prompts_in_place_of_the_episode_is_refused(own, gym_python):
    path = own / ENV.config_path
    path.write_text(CONFIG.replace("max_steps: 3", "return_transitions: true"))
    said = r"^env\.sums\.servers\.sums_agent\.return_transitions must be false, .* got true: "
    with pytest.raises(ConfigError, match=said):
        playable_servers("sums", ENV, site_packages(gym_python), gym_python)


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_an_evaluation_plays_rows_with_an_empty_input(own, gym_python):
    settings = ["model=tiny", "engine=hf", "env=[sums]", "evaluation.temperature=1"]
    settings += ["env.sums.max_output_tokens=16", f"output_dir={own / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "gymexp.evaluate", *settings],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=os.environ | NO_WAY_OUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    played = [outcome["rollout"] for outcome in rollouts_of(own / "run", "eval-000000")]
    assert len(played) == 4 and all(rollout["reward"] is not None for rollout in played)
