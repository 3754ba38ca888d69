"""Servers that already run are found through their head server; what does not fit is said before training."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.parse
from pathlib import Path

import pytest
from aiohttp import web
from loopback import serving
from omegaconf import OmegaConf

from gymexp.config.schema import EnvConfig
from gymexp.errors import ConfigError, ServiceError
from gymexp.gym.attached import check_policy, read_head, replicas_of, start_command, wait_for_agents

ENVS = {"sudoku": EnvConfig(config_path="a/b/sudoku.yaml", agent="sudoku_agent", max_steps=3)}


def running(agent_port: int = 5001) -> dict:
    """What a head server knows: its servers, and settings that are none."""
    return {
        "policy_base_url": "http://127.0.0.1:4000/v1",
        "head_server": {"host": "127.0.0.1", "port": 11000},
        "sudoku_agent": {"responses_api_agents": {"simple_agent": {"host": "127.0.0.1", "port": agent_port}}},
        "sudoku": {"resources_servers": {"sudoku": {"host": "127.0.0.1", "port": 5002}}},
        "policy_model": {
            "responses_api_models": {
                "vllm_model": {"base_url": "${policy_base_url}", "return_token_id_information": True}
            }
        },
    }


def head_app(config: dict | str) -> web.Application:
    """NeMo Gym's head server gives its config as YAML, in a JSON string."""

    async def give(request: web.Request) -> web.Response:
        text = config if isinstance(config, str) else json.dumps(OmegaConf.to_yaml(OmegaConf.create(config)))
        return web.Response(text=text, content_type="application/json")

    app = web.Application()
    app.add_routes([web.get("/global_config_dict_yaml", give), web.get("/", give)])
    return app


def address(url: str) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname and parts.port
    return parts.hostname, parts.port


def test_the_head_server_says_where_the_agents_are_and_which_policy_they_ask():
    with serving(head_app(running())) as url:
        head = read_head(*address(url))
    assert (
        head["policy_model"]["responses_api_models"]["vllm_model"]["base_url"] == "http://127.0.0.1:4000/v1"
    )
    [replica] = replicas_of(head, ENVS)["sudoku"]
    assert (replica.agent, replica.url) == ("sudoku_agent", "http://127.0.0.1:5001")
    check_policy(head, 4000)


def test_nobody_at_the_head_servers_address_names_the_settings():
    with pytest.raises(ServiceError, match=r"gym\.head_host and gym\.head_port .*http://127\.0\.0\.1:1/"):
        read_head("127.0.0.1", 1)


def test_another_program_at_the_head_servers_address_is_not_taken_for_one():
    with serving(head_app("<html>")) as url, pytest.raises(ServiceError, match="does not answer as one"):
        read_head(*address(url))


@pytest.mark.parametrize("answer", ["[1, 2]", '"[1, 2]"', "3", '"a: ${b}"', '"a: [1"'])
def test_an_answer_that_is_no_config_is_not_taken_for_one(answer):
    with serving(head_app(answer)) as url, pytest.raises(ServiceError, match="does not answer as one"):
        read_head(*address(url))


def test_an_agent_that_is_not_running_is_named_with_those_that_are():
    envs = {"sudoku": EnvConfig(config_path="c", agent="sudoko_agent")}
    with pytest.raises(ConfigError) as caught:
        replicas_of(running(), envs)
    assert "env.sudoku.agent must be an agent of the running servers, got 'sudoko_agent'" in str(caught.value)
    assert "did you mean sudoku_agent?" in str(caught.value)
    with pytest.raises(ConfigError, match="They have: none"):
        replicas_of({}, envs)


def with_model(**values) -> dict:
    return {"policy_model": {"responses_api_models": {"vllm_model": values}}}


@pytest.mark.parametrize("urls", ["http://h:4000/v1", ["http://h:9/v1", "http://h:4000/v1"], "http://h:4000"])
def test_a_model_server_that_asks_the_policy_port_fits(urls):
    check_policy(with_model(base_url=urls, return_token_id_information=True), 4000)


@pytest.mark.parametrize("url", ["http://h:40001/v1", "http://h:14000/v1", "http://h:400/v1"])
def test_a_model_server_that_asks_another_port_is_refused_with_both(url):
    with pytest.raises(ConfigError, match=r"gym\.policy_port must be the port of .*got 4000") as caught:
        check_policy(with_model(base_url=url, return_token_id_information=True), 4000)
    assert url in str(caught.value)


def test_a_model_server_without_token_ids_is_refused():
    with pytest.raises(ConfigError, match="return_token_id_information: true"):
        check_policy(with_model(base_url="http://h:4000/v1", return_token_id_information=False), 4000)


def test_running_servers_without_a_policy_model_are_refused():
    with pytest.raises(ConfigError, match="policy_model"):
        check_policy({"policy_model": {}}, 4000)


def test_gym_env_start_is_given_files_policy_and_turn_limits():
    envs = ENVS | {"again": EnvConfig(config_path="a/b/sudoku.yaml", agent="other_agent")}
    command = start_command(Path("venv/bin/python"), envs, 12345, "http://127.0.0.1:4000")
    assert command[:3] == ["venv/bin/gym", "env", "start"]
    [paths] = [word for word in command if word.startswith("+config_paths=")]
    assert paths.count("a/b/sudoku.yaml") == 1
    assert "vllm_model_for_training.yaml" in paths
    assert "+policy_base_url=http://127.0.0.1:4000/v1" in command
    assert "++sudoku_agent.responses_api_agents.simple_agent.max_steps=3" in command
    assert not [word for word in command if "other_agent" in word]


def test_agents_are_waited_for_until_they_answer():
    with serving(head_app("alive")) as agent, serving(head_app(running(address(agent)[1]))) as head:
        found = asyncio.run(wait_for_agents(*address(head), ENVS, 10))
    assert found["sudoku"][0].url == agent


def test_agents_that_never_answer_end_the_wait_at_the_deadline():
    began = time.monotonic()
    with (
        serving(head_app(running(agent_port=1))) as head,
        pytest.raises(ServiceError, match=r"not ready within 1 s \(gym\.start_timeout_s\)"),
    ):
        asyncio.run(wait_for_agents(*address(head), ENVS, 1))
    assert time.monotonic() - began < 10
