"""NeMo Gym 0.7's typed episodes and failures: what is sent, and that a failure is never a reward."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from loopback import serving

from gymexp.rollout.episode import failure_in
from gymexp.rollout.outcome import Played, Task
from gymexp.rollout.play import RolloutFailure, Sampling, play, request_body

ROW = {
    "responses_create_params": {"input": "Hello"},
    "agent_ref": {"type": "responses_api_agents", "name": "a"},
    "expected": "Hi",
    "_ng_task_index": 7,
}
TASK = Task("greet/train/000007", "greet", "a", ROW)
SAMPLING = Sampling(temperature=1.0, max_output_tokens=9, seed=1, play="abc0")
ITEM = {
    "type": "message",
    "prompt_token_ids": [1],
    "generation_token_ids": [2],
    "generation_log_probs": [-0.5],
}
SCORED = {"reward": 0.5, "response": {"output": [ITEM]}, "mask_sample": False, "failure_kind": None}
IDS = {"episode_id": {"rollout_id": "abc0", "attempt": 0}, "task_id": {"taskset": "greet", "task_id": "7"}}


def played(answer: Any, takes_episodes: bool = False, sent: list | None = None) -> Played:
    """What gymexp makes of this answer of an agent or of an environment server."""

    async def answer_run(request: web.Request) -> web.Response:
        if sent is not None:
            sent.append(await request.json())
        return web.json_response(answer)

    async def run(url: str) -> Played:
        async with aiohttp.ClientSession() as http:
            return await play(http, url, TASK, SAMPLING, 10, 5, None, 0.0, takes_episodes)

    app = web.Application()
    app.add_routes([web.post("/run", answer_run)])
    with serving(app) as url:
        return asyncio.run(run(url))


def test_an_environment_server_gets_the_row_as_a_typed_episode_with_names_of_its_own():
    """The fields are those of BaseEpisodeRequest of NeMo Gym 0.7, which takes no others."""
    sent: list[dict] = []
    outcome = played(IDS | {"result": SCORED | {"grade": "b"}, "failure": None}, True, sent)
    assert outcome.rollout.reward == 0.5 and outcome.rollout.verdict == {"grade": "b"}
    flat = json.loads(request_body(TASK, SAMPLING))
    params = flat["responses_create_params"]
    assert sent == [
        {
            "episode_id": {"rollout_id": "abc0", "attempt": 0},
            "task": {
                "task_id": {"taskset": "greet", "task_id": "greet/train/000007"},
                "task_input": {"responses_create_params": params, "expected": "Hi"},
            },
        }
    ]
    assert flat["agent_ref"] == ROW["agent_ref"], "an agent gets the row as it is"


FAILED = {"failure_reason": "no browser", "terminal": False}


@pytest.mark.parametrize(
    ("answer", "cause", "detail", "is_final"),
    [
        (IDS | {"result": None, "failure": FAILED}, "environment", "agent a: no browser", False),
        (
            IDS | {"failure": FAILED | {"failure_kind": "provider_unavailable", "stage": "seed"}},
            "environment",
            "agent a: provider_unavailable: seed: no browser",
            False,
        ),
        (IDS | {"failure": FAILED | {"terminal": True}}, "environment", "agent a: no browser", True),
        (
            IDS | {"failure": FAILED | {"failure_kind": "agent_timeout"}},
            "timeout",
            "agent a: agent_timeout: no browser",
            False,
        ),
        (
            IDS | {"failure": FAILED | {"failure_reason": "500: {'type': 'engine_error'}"}},
            "engine",
            "agent a: 500: {'type': 'engine_error'}",
            False,
        ),
        (
            {
                "_ng_failure_class": "environment_server_failed",
                "_ng_failure_terminal": True,
                "_ng_failure_message": "no session",
                "_ng_failure_stage": "agent",
                "agent_ref": {"name": "a"},
            },
            "environment",
            "agent a: environment_server_failed: no session",
            True,
        ),
        (
            SCORED | {"mask_sample": True, "failure_kind": "judge_failed", "failure_reason": "503"},
            "environment",
            "agent a: judge_failed: mask_sample: 503",
            False,
        ),
        (
            SCORED | {"instance_config": {"mask_sample": True}},
            "environment",
            "agent a: mask_sample: the environment says that the reward is no measurement",
            False,
        ),
    ],
)
def test_a_failure_is_a_failed_attempt_and_no_reward(answer, cause, detail, is_final):
    with pytest.raises(RolloutFailure) as caught:
        played(answer, "episode_id" in answer)
    failure = caught.value
    assert (failure.cause, failure.detail, failure.is_final) == (cause, detail, is_final)


def test_a_reward_that_is_valid_although_something_failed_counts():
    """NeMo Gym: a sample that degraded but was measured validly keeps mask_sample=False and names a kind."""
    degraded = SCORED | {"failure_kind": "session_release_failed", "instance_config": {"mask_sample": False}}
    outcome = played(degraded)
    assert outcome.rollout.reward == 0.5
    assert outcome.rollout.verdict["failure_kind"] == "session_release_failed"
    assert failure_in([]) is None
