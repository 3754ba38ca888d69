"""What an agent is sent for a task, and what its answer says about the episode."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import replace
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from loopback import serving

from gymexp.errors import TokenMismatch
from gymexp.rollout.batch import build_batch
from gymexp.rollout.outcome import Completed, Task, Truncated, Turn, outcome_to_json
from gymexp.rollout.play import RolloutFailure, Sampling, play, read_reply, request_body

ROW = {
    "question": "1+1",
    "responses_create_params": {"input": [{"role": "user", "content": "1+1"}], "metadata": {"own": "kept"}},
}
TASK = Task("sudoku/train/000001", "sudoku", "simple_agent", ROW)
SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_output_tokens=32, seed=5, play="abc")


def said(prompt: list[int], completion: list[int], kind: str = "message", **fields: Any) -> dict:
    ids = {"prompt_token_ids": prompt, "generation_token_ids": completion}
    return {"type": kind, **ids, "generation_log_probs": [-0.5] * len(completion)} | fields


TWO = [
    {"type": "reasoning", "summary": []},
    said([1], [2, 3], "function_call", name="search"),
    {"type": "function_call_output", "output": "x"},
    said([1, 2, 3, 4], [5]),
]


def answer(*items: dict, **more: Any) -> dict:
    return {"reward": 0.5, "response": {"output": list(items or TWO)}} | more


def cut(reply: dict, reason: str = "max_output_tokens") -> dict:
    return reply | {"response": reply["response"] | {"incomplete_details": {"reason": reason}}}


def test_a_row_is_sent_as_it_is_with_how_to_sample_where_nemo_gym_has_it():
    before = json.dumps(ROW)
    sent = json.loads(request_body(TASK, SAMPLING))
    assert json.dumps(ROW) == before, "the task's own row stays"
    params = sent.pop("responses_create_params")
    assert sent == {"question": "1+1"}
    assert json.loads(params["metadata"].pop("extra_body")) == {"seed": 5, "play": "abc"}
    assert params == {
        "input": [{"role": "user", "content": "1+1"}],
        "metadata": {"own": "kept"},
        "temperature": 0.7,
        "top_p": 0.9,
        "max_output_tokens": 32,
    }
    bare = Task("k", "e", "a", {"responses_create_params": {"input": [], "metadata": None}})
    assert list(json.loads(request_body(bare, SAMPLING))["responses_create_params"]["metadata"]) == [
        "extra_body"
    ]


def test_unless_told_otherwise_the_policy_samples_from_its_whole_softmax():
    """At the values that switch vLLM's sampling parameters off."""
    plain = Sampling(temperature=0.5, max_output_tokens=9, seed=1)
    off = (plain.top_p, plain.top_k, plain.min_p, plain.repetition_penalty)
    assert off == (1.0, 0, 0.0, 1.0)
    params = json.loads(request_body(TASK, plain))["responses_create_params"]
    assert (params["temperature"], params["top_p"], params["max_output_tokens"]) == (0.5, 1.0, 9)
    assert json.loads(params["metadata"]["extra_body"]) == {"seed": 1, "play": ""}


@pytest.mark.parametrize("fields", [{"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2}])
def test_what_openais_responses_have_no_field_for_goes_with_the_seed(fields):
    asked = Sampling(temperature=0.5, max_output_tokens=9, seed=1, play="p", **fields)
    metadata = json.loads(request_body(TASK, asked))["responses_create_params"]["metadata"]
    assert json.loads(metadata["extra_body"]) == {"seed": 1, "play": "p"} | fields


def test_turns_are_the_items_that_carry_ids_and_items_are_kept_without_them():
    outcome = read_reply(TASK, answer(), 10, 1.23456789)
    assert isinstance(outcome, Completed)
    rollout = outcome.rollout
    assert rollout.turns == [Turn([1], [2, 3], [-0.5, -0.5]), Turn([1, 2, 3, 4], [5], [-0.5])]
    assert (rollout.task, rollout.reward, rollout.seconds) == (TASK, 0.5, {"total": 1.2346})
    assert rollout.items == [
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "name": "search"},
        {"type": "function_call_output", "output": "x"},
        {"type": "message"},
    ]
    as_text = [said(["1"], ["2"], generation_log_probs=[-0.5])]  # as NeMo Gym's own tokenizing gives them
    assert read_reply(TASK, answer(*as_text), 10, 1.0).rollout.turns == [Turn([1], [2], [-0.5])]


TOOL_RAN = TWO[:3]


@pytest.mark.parametrize(
    ("reply", "max_steps", "limit"),
    [
        (answer(), None, None),
        (answer(), 3, None),
        (answer(), 2, None),  # the last act was to say something
        (answer(*TOOL_RAN), None, None),
        (answer(*TOOL_RAN), 2, None),
        (answer(*TOOL_RAN), 1, "turns"),
        (answer(*TOOL_RAN, {"type": "other"}), 1, "turns"),
        (answer(TWO[1]), 1, None),  # a call that its agent does not run
        (answer(truncated=True), None, "turns"),
        (answer(terminated=True), 2, None),
        (answer(*TOOL_RAN, terminated=True), 1, None),
        (answer(*TOOL_RAN, terminated=True, truncated=True), 9, "turns"),
        (answer(*TOOL_RAN, terminated=False, truncated=False), 1, "turns"),
        (cut(answer()), None, "length"),
        (cut(answer(*TOOL_RAN)), 1, "length"),
        (answer() | {"response": answer()["response"] | {"incomplete_details": {}}}, None, None),
        (answer() | {"response": answer()["response"] | {"incomplete_details": None}}, None, None),
    ],
)
def test_an_episode_is_cut_by_a_limit_or_ended_by_itself(reply, max_steps, limit):
    outcome = read_reply(TASK, reply, 10, 1.0, max_steps)
    assert (outcome.limit if isinstance(outcome, Truncated) else None) == limit
    assert outcome.rollout.reward == 0.5 and len(outcome.rollout.turns) >= 1


def test_without_token_ids_the_prompt_was_too_long_or_it_is_the_engines_failure():
    silent = answer({"type": "message"})
    for reply, cause, says in (
        (silent, "engine", "the policy's answer has no token ids$"),
        (cut(silent), "prompt_too_long", "the first prompt is longer than model.max_model_len"),
    ):
        with pytest.raises(RolloutFailure, match=says) as failure:
            read_reply(TASK, reply, 10, 1.0)
        assert failure.value.cause == cause and failure.value.detail == str(failure.value)


def test_a_context_that_is_full_in_a_later_turn_cuts_the_episode():
    outcome = read_reply(TASK, cut(answer(*TOOL_RAN, {"type": "message"})), 10, 1.0)
    assert isinstance(outcome, Truncated) and outcome.limit == "length" and outcome.rollout.reward == 0.5


def test_what_the_environment_refuses_has_its_tokens_and_the_reward_for_that():
    refused = {
        "refused": "400: no action",
        "responses": [answer(item)["response"] for item in (TWO[1], TWO[3])],
    }
    outcome = played(Agent(json.dumps(refused), 400), refused_reward=-0.25)
    assert isinstance(outcome, Completed)
    assert (outcome.rollout.reward, outcome.rollout.refused) == (-0.25, "400: no action")
    assert [turn.completion_ids for turn in outcome.rollout.turns] == [[2, 3], [5]]
    failure = played(Agent('{"detail": "no session"}', 400))
    assert isinstance(failure, RolloutFailure) and failure.cause == "environment"


def test_what_else_the_environment_said_is_kept_and_what_is_too_long_is_named_with_its_size():
    said = {"extracted_answer": "7", "score": 0.5, "judge": {"verdict": "[[A]]"}, "none": None}
    reply = answer(*TOOL_RAN) | said | {"responses_create_params": {"input": "x"}}
    assert read_reply(TASK, reply, 10, 0.0).rollout.verdict == {
        "extracted_answer": "7",
        "score": 0.5,
        "judge": {"verdict": "[[A]]"},
    }
    task = replace(TASK, row=TASK.row | {"score": 0.5, "extracted_answer": "8"})
    sent_back = read_reply(task, reply, 10, 0.0).rollout.verdict
    assert sent_back == {"extracted_answer": "7", "judge": {"verdict": "[[A]]"}}, "the row has the score"
    long = read_reply(TASK, reply | {"log": "x" * 70_000, "late": 1}, 10, 0.0).rollout.verdict
    assert re.fullmatch(r"\(700\d\d bytes, left out\)", long["log"]) and long["score"] == 0.5


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [nested(250), nested(254), "\ud83d", 1 << 70])
def test_a_verdict_that_no_file_could_have_is_named_and_ends_nothing(value):
    rollout = read_reply(TASK, answer(*TOOL_RAN) | {"parsed": value, "score": 1}, 10, 0.0).rollout
    assert rollout.verdict == {"parsed": "(cannot be written as JSON)", "score": 1}
    orjson.dumps(outcome_to_json(Completed(rollout)))
    with pytest.raises(RolloutFailure, match="the episode's items cannot be written as JSON"):
        read_reply(TASK, answer(*TOOL_RAN, {"type": "message", "content": value}), 10, 0.0)


def test_what_may_not_be_trained_on_is_no_rollout():
    with pytest.raises(TokenMismatch, match="turn 1"):
        read_reply(TASK, answer(said([1], [2]), said([2, 2], [3])), 10, 1.0)
    with pytest.raises(TokenMismatch, match=r"in \[0, 5\)"):
        read_reply(TASK, answer(), 5, 1.0)
    for reward in ("nan", "inf", "-inf"):
        with pytest.raises(RolloutFailure, match="must be finite and within"):
            read_reply(TASK, answer(reward=float(reward)), 10, 1.0)


class Agent:
    def __init__(self, body: str, status: int = 200, wait_s: float = 0.0, failed: str = "") -> None:
        self.body, self.status, self.wait_s = body, status, wait_s
        self.headers = {"x-gymexp-failed": failed}
        self.asked: list[tuple[str, Any]] = []

    async def run(self, request: web.Request) -> web.Response:
        self.asked.append((request.content_type, await request.json()))
        await asyncio.sleep(self.wait_s)
        return web.Response(text=self.body, status=self.status, headers=self.headers)


def played(agent: Agent, timeout_s: float = 10.0, max_steps: int | None = None, refused_reward: float = 0.0):
    """The outcome of one playing, or the failure."""

    async def run(url: str):
        async with aiohttp.ClientSession() as http:
            try:
                return await play(http, url, TASK, SAMPLING, timeout_s, 10, max_steps, refused_reward)
            except RolloutFailure as failure:
                return failure

    app = web.Application()
    app.add_routes([web.post("/run", agent.run)])
    with serving(app) as url:
        return asyncio.run(run(url))


def test_a_playing_is_one_request_and_its_seconds_are_measured():
    agent = Agent(json.dumps(answer(*TOOL_RAN)), wait_s=0.1)
    outcome = played(agent, max_steps=1)
    assert isinstance(outcome, Truncated) and 0.1 <= outcome.rollout.seconds["total"] < 5
    assert outcome.rollout.seed == SAMPLING.seed and abs(time.time() - outcome.rollout.began) < 60
    [(content_type, sent)] = agent.asked
    assert content_type == "application/json" and sent == json.loads(request_body(TASK, SAMPLING))


@pytest.mark.parametrize(
    ("agent", "cause", "detail"),
    [
        (Agent("no such table", 500), "environment", "/run answered 500: no such table"),
        (Agent("moved", 301), "environment", "/run answered 301: moved"),
        (Agent('{"type": "engine_error"}', 500), "engine", "/run answered 500"),
        (Agent('{"type": "token_mismatch"}', 500), "token_mismatch", "agent simple_agent: http"),
        (Agent("x" * 9000, 500), "environment", "x" * 2000),
        (Agent("{"), "environment", "/run answered what is not a rollout"),
        (Agent("[]"), "environment", "/run answered what is not a rollout"),
        (Agent('{"response": {"output": [3]}}'), "environment", "/run answered what is not a rollout"),
        (Agent(json.dumps(answer(TWO[3], TWO[1]))), "token_mismatch", "agent simple_agent: turn 1"),
        (Agent(json.dumps(answer({"type": "message"}))), "engine", "no token ids"),
    ],
)
def test_a_playing_that_fails_says_whose_failure_it_is(agent, cause, detail):
    failure = played(agent)
    assert isinstance(failure, RolloutFailure), failure
    assert failure.cause == cause and detail in failure.detail
    assert failure.detail.startswith(
        "agent simple_agent: " if cause == "token_mismatch" else ("http", "the pol")
    )
    assert len(failure.detail) < 2100


def test_an_engine_failure_that_the_gateway_named_is_the_engines_though_its_text_was_lost():
    said = {"server": "gateway", "said": "endpoint.url=http://them/v1: gone", "cause": "engine"}
    episode = {"episode_id": {}, "failure": {"failure_kind": "agent_error", "stage": "rollout"}}
    for agent in (
        Agent("Internal Server Error", 500, failed=json.dumps(said)),
        Agent(json.dumps(episode), failed=json.dumps(said)),
    ):
        failure = played(agent)
        assert (failure.cause, failure.detail) == ("engine", "endpoint.url=http://them/v1: gone")
    del said["cause"]
    failure = played(Agent("Internal Server Error", 500, failed=json.dumps(said)))
    assert (failure.cause, failure.detail) == ("environment", "gateway: endpoint.url=http://them/v1: gone")
    assert played(Agent("no such table", 500, failed="[1]")).cause == "environment"


def test_an_agent_that_does_not_answer_in_time_or_is_away_is_named_with_its_url():
    began = time.monotonic()
    failure = played(Agent("{}", wait_s=30), timeout_s=0.2)
    assert (failure.cause, time.monotonic() - began < 5) == ("timeout", True)
    assert failure.detail.startswith("no answer from http") and failure.detail.endswith("/run within 0.2 s")

    async def away():
        async with aiohttp.ClientSession() as http:
            await play(http, "http://127.0.0.1:9", TASK, SAMPLING, 5.0, 10, None, 0.0)

    with pytest.raises(RolloutFailure, match=r"http://127\.0\.0\.1:9/run: ClientConnectorError") as failed:
        asyncio.run(away())
    assert failed.value.cause == "environment"


def text(content: str = "hello") -> dict:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": content}]}


CALL = {"type": "function_call", "name": "search", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "output": "x"}


@pytest.mark.parametrize(
    ("items", "turns"),
    [
        ([text()], 1),
        ([{"type": "reasoning", "summary": []}, CALL, CALL, OUTPUT, OUTPUT, text()], 2),
        ([CALL, OUTPUT, CALL, OUTPUT, {"type": "message", "role": "user", "content": "go on"}, text()], 3),
    ],
)
def test_a_policy_of_text_alone_has_no_turns_with_tokens_but_a_number_of_them(items, turns):
    played = read_reply(TASK, answer(*items), vocab_size=None, seconds=1.0)
    assert isinstance(played, Completed)
    assert played.rollout.turns == [] and played.rollout.usage == {"turns": turns}
    assert played.rollout.reward == 0.5 and played.rollout.items == items


def test_a_policy_of_text_alone_is_cut_by_the_limits_of_length_and_turns_too():
    assert read_reply(TASK, cut(answer(text())), None, 1.0).limit == "length"
    assert read_reply(TASK, answer(CALL, OUTPUT), None, 1.0, max_steps=1).limit == "turns"
    with pytest.raises(RolloutFailure, match="longer than"):
        read_reply(TASK, cut({"reward": 0.0, "response": {"output": []}}), None, 1.0)


def test_training_never_takes_an_answer_of_text_alone():
    with pytest.raises(RolloutFailure, match="no token ids"):
        read_reply(TASK, answer(text()), vocab_size=100, seconds=1.0)
    outcome = read_reply(TASK, answer(text()), vocab_size=None, seconds=1.0)
    with pytest.raises(AssertionError, match="cannot be trained on"):
        build_batch([outcome], placeholder_id=0, mask_truncated=False)
