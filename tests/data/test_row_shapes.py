"""Rows of all shapes: those that NeMo Gym's servers play are taken, all others are refused at the start."""

from __future__ import annotations

import asyncio
import contextlib
import json
from contextlib import ExitStack

import aiohttp
import pytest
from loopback import serving
from real_servers import Servers, policy_that_says
from row_shapes import SHAPES, F

from gymexp.config.schema import DataConfig, EnvConfig, GymConfig, RunConfig
from gymexp.data.prepare import load_prepared, prepare, write_prepared
from gymexp.data.request_check import Split, first_requests
from gymexp.data.rows import read_rows
from gymexp.errors import DataError
from gymexp.gym.install import site_packages
from gymexp.gym.server_plan import plan
from gymexp.rollout.outcome import Task
from gymexp.rollout.play import Sampling, request_body

pytestmark = pytest.mark.gym
SERVER = """
from nemo_gym.base_resources_server import (
    BaseResourcesServerConfig, BaseVerifyRequest, BaseVerifyResponse, SimpleResourcesServer,
)

class Any(SimpleResourcesServer):
    config: BaseResourcesServerConfig

    async def verify(self, body: BaseVerifyRequest) -> BaseVerifyResponse:
        return BaseVerifyResponse(**body.model_dump(), reward=1.0)
"""
CONFIG = """
any:
  resources_servers:
    any: {entrypoint: app.py, domain: other}
any_agent:
  responses_api_agents:
    simple_agent:
      entrypoint: app.py
      max_steps: 1
      resources_server: {type: resources_servers, name: any}
      model_server: {type: responses_api_models, name: policy_model}
"""
SAMPLING = Sampling(temperature=1.0, max_output_tokens=8, seed=1)
ENV = EnvConfig(config_path="resources_servers/any/configs/any.yaml", agent="any_agent")


@pytest.fixture(scope="module")
def played(gym_python, tmp_path_factory) -> dict[str, int]:
    """What the real agent answers to each shape, nulls and all but those that count as absent."""
    own = tmp_path_factory.mktemp("own")
    folder = own / "resources_servers" / "any"
    (folder / "configs").mkdir(parents=True)
    (folder / "app.py").write_text(SERVER)
    (folder / "configs" / "any.yaml").write_text(CONFIG)

    async def story(policy: str) -> dict[str, int]:
        with ExitStack() as stack:
            site = site_packages(gym_python)
            servers = Servers(
                lambda port: plan({"any": ENV}, GymConfig(), site, [policy], port), gym_python, own, stack
            )
            try:
                await servers.supervisor.wait_ready(servers.names, 120)
                url = servers.layout.replicas["any"][0].url
                async with aiohttp.ClientSession() as http:
                    asked = {name: asyncio.create_task(ask(http, url, s.row)) for name, s in SHAPES.items()}
                    return {name: await answer for name, answer in asked.items()}
            finally:
                await servers.supervisor.close()

    with pytest.MonkeyPatch.context() as patch, serving(policy_that_says("4")) as policy:
        patch.chdir(own)
        return asyncio.run(asyncio.wait_for(story(policy), 300))


async def ask(http: aiohttp.ClientSession, url: str, row: dict) -> int:
    """The status of a rollout. A null that NeMo Gym refuses is asked for again without its key."""
    for shape in (row, without_nulls(row)):
        body = json.dumps(shape).encode()
        with contextlib.suppress(KeyError, TypeError, ValueError):  # no such row is ever sent
            body = request_body(Task("any/train/0", "any", "any_agent", shape), SAMPLING)
        async with http.post(f"{url}/run", data=body, headers={"Content-Type": "application/json"}) as answer:
            await answer.read()
            if answer.status == 200:
                return 200
    return answer.status


def without_nulls(value):
    """Nulls of objects taken out, but for a tool's `strict`, which NeMo Gym wants to be there."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None or k == "strict"}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def test_there_are_many_shapes_and_more_are_refused_than_taken():
    assert len(SHAPES) >= 66 and sum(not shape.taken for shape in SHAPES.values()) >= 36


# NeMo Gym 0.7 plays these as well; the gateway refuses the choice of a function.
TAKEN_BY_NEWER = {"role tool", "tool with null as parameters", "choice of one function"}


@pytest.fixture(scope="module")
def is_newer(request) -> bool:
    return request.config.getoption("--gym-version") is not None


@pytest.mark.parametrize("name", SHAPES)
def test_nemo_gym_plays_a_row_of_this_shape_or_does_not(name, played, is_newer):
    taken = SHAPES[name].taken or (is_newer and name in TAKEN_BY_NEWER)
    assert (played[name] == 200) is taken, played[name]


@pytest.fixture(scope="module")
def refused(gym_python, tmp_path_factory) -> dict[str, str]:
    """What is said of each shape that NeMo Gym does not play."""
    here = tmp_path_factory.mktemp("shapes")
    said: dict[str, str] = {}
    rows: dict[str, list] = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        if shape.taken:
            continue
        path = here / f"{number}.jsonl"
        path.write_text("\n" + json.dumps(shape.row))
        try:
            rows[name] = read_rows(path, "any", "any_agent")
        except DataError as error:
            said[name] = str(error)
    splits = [Split(name, "train", here / name, "", some) for name, some in rows.items()]
    with pytest.raises(DataError) as caught:
        first_requests(RunConfig(), splits, gym_python, here, print)
    for text in str(caught.value).split("env.")[1:]:
        said[text.partition(".data:")[0]] = f"env.{text}"
    return said


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if not shape.taken])
def test_a_row_that_nemo_gym_does_not_play_is_refused_with_line_and_field(name, refused, is_newer):
    if is_newer and name in TAKEN_BY_NEWER:
        assert name not in refused
        return
    first, *others = refused[name].strip().splitlines()
    assert first.startswith("env.") and "in its rows" in first
    assert all(":2: responses_create_params" in line for line in others), others
    if not is_newer:  # which finds some faults only as it makes the request, and names no field then
        assert f"{SHAPES[name].at}: " in others[0] or f"{SHAPES[name].at}, " in others[0]


def test_rows_that_nemo_gym_plays_are_taken_without_the_nulls_that_it_refuses(gym_python, tmp_path):
    rows = [shape.row for shape in SHAPES.values() if shape.taken]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig("jsonl", train_file=str(path), validation_file=str(path), validation_size=1)
    config = RunConfig(env={"any": EnvConfig("any.yaml", "any_agent", data=data)})
    for _ in ("asked", "kept"):
        prepared = prepare(config, gym_python, tmp_path / "cache", print)
        tasks = sorted(prepared.train, key=lambda task: task.key)
        got = [{k: v for k, v in task.row.items() if k != "agent_ref"} for task in tasks]
        assert list(map(without_nulls, got)) == list(map(without_nulls, rows))
        parameters = [row["responses_create_params"] for row in got]
        for key in ("tools", "tool_choice", "parallel_tool_calls"):
            assert not [p for p in parameters if p.get(key, ...) is None]


def test_integers_reach_an_agent_as_integers(gym_python, tmp_path):
    largest, least = 2**64 - 1, -(2**63)
    numbers = {"one": 1, "float": 1.0, "large": 2**53 + 1, "largest": largest, "least": least}
    row = {"responses_create_params": {"input": "x", "tools": [F | {"parameters": {"maximum": largest}}]}}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row | {"numbers": numbers}))
    data = DataConfig("jsonl", train_file=str(path), validation_file=str(path))
    config = RunConfig(env={"any": EnvConfig("any.yaml", "any_agent", data=data)})
    written = prepare(config, gym_python, tmp_path / "cache", print)
    write_prepared(written, tmp_path / "data")
    [task] = load_prepared(tmp_path / "data").train
    sent = json.loads(request_body(task, SAMPLING))
    assert repr(sent["numbers"]) == repr(numbers)
    assert repr(sent["responses_create_params"]["tools"][0]["parameters"]) == repr({"maximum": largest})
