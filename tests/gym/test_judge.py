"""A judge of the user's takes the place of the models that NeMo Gym's servers ask; one that fails gives no
reward. The servers are NeMo Gym's own, the policy and the judge are on loopback."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from loopback import serving
from real_servers import Servers, policy_that_says
from test_definitions import ROOM, site_with

from gymexp.config.schema import EnvConfig, GymConfig, JudgeConfig
from gymexp.errors import ConfigError, ServiceError
from gymexp.gym import judge_calls
from gymexp.gym.catalogue import load_catalogue, options_of
from gymexp.gym.definitions import ensure_environments, playable_servers, server_of
from gymexp.gym.install import site_packages
from gymexp.gym.server_plan import plan
from gymexp.gym.server_settings import JUDGE, check_variables
from gymexp.record.places import cache_dir
from gymexp.rollout.outcome import Completed, Task
from gymexp.rollout.play import RolloutFailure, Sampling, play

ARENA = "arena_judge"
KEY = "a-key-of-the-judge-5b19"
SAMPLING = Sampling(temperature=1.0, max_output_tokens=64, seed=1, play="p")


class Judge:
    """An OpenAI-compatible server. `status`: of its answers. `said`: the answer's text."""

    def __init__(self) -> None:
        self.said, self.status = "", 200
        self.asked: list[tuple[dict[str, Any], str | None]] = []
        self.app = web.Application()
        self.app.add_routes([web.post("/v1/chat/completions", self.complete)])

    async def complete(self, request: web.Request) -> web.Response:
        self.asked.append((await request.json(), request.headers.get("Authorization")))
        if self.status != 200:  # with words that NeMo Gym takes for a full context, and the key
            text = f"max_tokens is too large, and {request.headers['Authorization']} knows no context length"
            return web.json_response({"error": {"message": text}}, status=self.status)
        choice = {"index": 0, "message": {"role": "assistant", "content": self.said}, "finish_reason": "stop"}
        about = {"id": "j", "object": "chat.completion", "created": 1, "model": "wise"}
        return web.json_response(about | {"choices": [choice]})


def environment(name: str, url: str) -> EnvConfig:
    """NeMo Gym's environment of this name, with a judge."""
    options = options_of(load_catalogue(GymConfig(), cache_dir(), print)[name])
    env = EnvConfig(**{k: v for k, v in options.items() if k != "data"})
    env.judge = JudgeConfig(url, "wise", "JUDGE_KEY")
    env.timeout_s = 60.0
    return env


def row_of(name: str, site: Path) -> dict[str, Any]:
    path = site / str(load_catalogue(GymConfig(), cache_dir(), print)[name].examples)
    return orjson.loads(path.read_bytes().splitlines()[0])


@pytest.mark.gym
def test_real_servers_ask_the_judge_and_its_failure_is_no_reward(gym_python, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("ARENA_JUDGE_API_KEY", KEY)
    monkeypatch.setenv("ARENA_JUDGE_MODEL", "wise")
    site = site_packages(gym_python)
    judge, policy = Judge(), policy_that_says("kill 1234 does it.")
    # NeMo Gym's first one takes a judge that fails for an unclear verdict, with a reward of its own. The
    # second asks its judge by the address alone, and takes a failure for a verdict.
    names = ["over_refusal_detection", "verifif"]
    found: dict[str, Any] = {}

    async def story(judge_url: str, policy_url: str, stack: ExitStack) -> None:
        envs = {name: environment(name, f"{judge_url}/v1") for name in names}
        monkeypatch.setenv("ARENA_JUDGE_BASE_URL", f"{judge_url}/v1")
        envs[ARENA] = environment(ARENA, "")
        envs[ARENA].judge = JudgeConfig()  # NeMo Gym's own file names one, by these variables
        envs["broken"] = environment(names[0], f"{judge_url}/v1")
        envs["broken"].servers = {names[0]: {"reward_if_complid": 1.0}}  # NeMo Gym would ignore it
        python = ensure_environments(GymConfig(), envs, cache_dir(), print)
        layout_of = lambda port: plan(envs, GymConfig(), site, [policy_url], port, python=python)  # noqa: E731
        servers = Servers(layout_of, python, tmp_path, stack)
        try:
            with pytest.raises(ServiceError) as caught:
                await asyncio.wait_for(asyncio.shield(servers.supervisor.failed), 120)
            found["broken"] = str(caught.value)
            services = servers.supervisor.services
            good = [name for name in servers.names if name != f"broken-{names[0]}"]
            while any(services[name].state != "ready" for name in good):
                await asyncio.sleep(0.05)
            async with aiohttp.ClientSession() as http:
                for judge.status, judge.said in [(200, "[[COMPLIED]]"), (400, ""), (401, "")]:
                    for name in [*names, ARENA] if judge.status != 200 else names:
                        [replica] = servers.layout.replicas[name]
                        task = Task("t", name, replica.agent, row_of(name, site))
                        try:
                            got: Any = await play(http, replica.url, task, SAMPLING, 60.0, 10, None, 0.0)
                        except RolloutFailure as failure:
                            got = failure
                        found.setdefault(name, []).append(got)
        finally:
            await servers.supervisor.close()

    with ExitStack() as stack:
        urls = stack.enter_context(serving(judge.app)), stack.enter_context(serving(policy))
        asyncio.run(asyncio.wait_for(story(*urls, stack), 200))
    assert (
        "env.broken.servers.over_refusal_detection.reward_if_complid is no key of this server; did you mean "
        "reward_if_complied?"
    ) in found.pop("broken")
    of_file = found.pop(ARENA)
    assert [(failure.cause, failure.server) for failure in of_file] == 2 * [
        ("environment", f"{ARENA}-arena_judge_judge_model")
    ]
    assert "/v1/chat/completions answered 401: " in of_file[1].detail
    for name, (judged, *failures) in found.items():
        assert isinstance(judged, Completed)
        assert [(f.cause, f.server) for f in failures] == 2 * [("environment", f"{name}-{JUDGE}")]
        for failure, status in zip(failures, (400, 401), strict=True):
            assert f"/v1/chat/completions answered {status}: " in failure.detail
    refusal, _ = (found[name][0].rollout for name in names)
    assert refusal.reward == 1.0 and refusal.verdict["judge_evaluation"]["verdict_label"] == "[[COMPLIED]]"
    assert [body["model"] for body, _ in judge.asked] == ["wise"] * len(judge.asked)
    assert {key for _, key in judge.asked} == {f"Bearer {KEY}"}
    first, _ = judge.asked[0]
    assert "kill 1234 does it." in first["messages"][-1]["content"]
    assert set(first) == {"messages", "max_tokens", "temperature", "model"}, "fields that OpenAI knows"
    for log in tmp_path.glob("*.log"):
        assert KEY not in log.read_text(), log.name


def judged(values: str, tmp_path: Path, **more: Any) -> dict[str, Any]:
    """The servers of an environment whose resources server has these values, with the judge."""
    env = dataclasses.replace(ROOM, judge=JudgeConfig("http://127.0.0.1:9/v1/", "wise", "JUDGE_KEY"), **more)
    return playable_servers("room", env, site_with(tmp_path, values))


@pytest.mark.parametrize(
    "values",
    [
        "judge: {type: responses_api_models, name: nobody}",
        "judge: {type: responses_api_models, name: policy_model}",
        'judge: {type: responses_api_models, name: "???"}',
        "judges: [{type: responses_api_models, name: nobody}]",
    ],
)
def test_a_model_that_a_resources_server_asks_becomes_the_judge(values, tmp_path):
    servers = judged(values, tmp_path)
    assert server_of(servers[JUDGE]) == (
        "responses_api_models",
        "vllm_model",
        {
            "entrypoint": "app.py",
            "base_url": "http://127.0.0.1:9/v1",
            "api_key": "${oc.env:JUDGE_KEY}",
            "model": "wise",
            "return_token_id_information": False,
            "uses_reasoning_parser": True,
        },
    )
    assert f"'name': '{JUDGE}'" in str(servers["room"]) and "nobody" not in str(servers["room"])
    assert server_of(servers["walker"])[2]["model"]["name"] == "policy_model", "agents ask the policy"


def test_a_judge_for_an_environment_without_one_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"env.room.judge must be left out: none of its servers asks a mod"):
        judged("port: 1", tmp_path)
    off = "judge: {type: responses_api_models, name: x}, should_use_judge: false"
    with pytest.raises(ConfigError, match=r"env\.room\.servers\.room\.should_use_judge=true it asks one"):
        judged(off, tmp_path / "off")
    servers = judged(off, tmp_path / "on", servers={"room": {"should_use_judge": True}})
    assert server_of(servers["room"])[2]["judge"]["name"] == JUDGE


def test_a_variable_that_is_not_set_is_named_with_the_key_that_asks_for_it(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    env = dataclasses.replace(ROOM, judge=JudgeConfig("http://127.0.0.1:9/v1", "wise", "JUDGE_KEY"))
    with pytest.raises(ConfigError, match=r"^env\.room\.judge\.key_env=JUDGE_KEY must name an environment v"):
        check_variables({"room": env})
    monkeypatch.setenv("JUDGE_KEY", KEY)
    check_variables({"room": env})
    secret = dataclasses.replace(ROOM, servers={"room": {"api_key": {"key_env": "OTHER_KEY"}}})
    with pytest.raises(ConfigError, match=r"^env\.room\.servers\.room\.api_key\.key_env=OTHER_KEY must name"):
        check_variables({"room": secret})


@pytest.mark.parametrize(
    ("status", "headers", "patience", "pause"),
    [
        (429, {"Retry-After": "7"}, 60.0, 7.0),
        (503, {"Retry-After": "7"}, 60.0, 7.0),
        (429, {}, 60.0, 0.0),
        (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 60.0, 0.0),
        (503, {}, 30.0, 0.0),
        (401, {"Retry-After": "7"}, 0.0, 0.0),
    ],
)
def test_an_overloaded_judge_is_asked_again_when_it_says_so_as_long_as_the_rollout_lasts(
    status, headers, patience, pause
):
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, headers=headers, text="later")

    async def ask(url: str) -> tuple[float, float, Any]:
        async with aiohttp.ClientSession() as http:
            return await judge_calls._try(http, 60.0, {"method": "POST", "url": url})

    app = web.Application()
    app.add_routes([web.post("/", answer)])
    with serving(app) as url:
        assert asyncio.run(ask(url)) == (patience, pause, f"answered {status}: later")
