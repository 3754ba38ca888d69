"""Whatever an agent, its servers or the controller do, every task gets its outcome, in order and in time."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from aiohttp import web
from loopback import serving
from trl.trainer.utils import nanstd

from gymexp.config.schema import EnvConfig, RolloutConfig
from gymexp.errors import RolloutError, ServiceError
from gymexp.record.services_file import Replica
from gymexp.rollout import collect, spare_replicas
from gymexp.rollout.attempts import knows_versions, turn_key
from gymexp.rollout.collect import Collector, ControllerGone, Stopped
from gymexp.rollout.failed_share import check_failed_share
from gymexp.rollout.outcome import Completed, Failed, Rollout, Task, Truncated
from gymexp.rollout.play import Sampling, read_reply
from gymexp.rollout.progress import Progress

VOCAB_SIZE = 100
AFTER_FAILURE_S = collect._AFTER_FAILURE_S
SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_output_tokens=32, seed=5)


def turn(prompt: list[int], completion: list[int], **fields) -> dict:
    tokens = {"prompt_token_ids": prompt, "generation_token_ids": completion}
    return {"type": "message", **tokens, "generation_log_probs": [-0.5] * len(completion)} | fields


def reply(*items: dict, reward: float = 1.0, **fields) -> dict:
    output = list(items or [turn([1, 2], [3, 4])])
    return {"reward": reward, "response": {"output": output} | fields}


Answer = dict | str | tuple[int, str]
Behave = Callable[[str, int], Awaitable[Answer]]


class Agent:
    """Answers POST /run as `behave(key, attempt)` says: a reply, or a status with a text."""

    def __init__(self, behave: Behave) -> None:
        self._behave = behave
        self.attempts: Counter[str] = Counter()
        self.asked: list[dict] = []
        self.asked_at: list[float] = []
        self.in_flight = 0
        self.most_in_flight = 0

    async def run(self, request: web.Request) -> web.Response:
        row = await request.json()
        self.asked.append(row)
        self.asked_at.append(time.monotonic())
        self.attempts[row["key"]] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            answer = await self._behave(row["key"], self.attempts[row["key"]])
        finally:
            self.in_flight -= 1
        if isinstance(answer, dict):
            return web.json_response(answer)
        status, text = answer if isinstance(answer, tuple) else (200, answer)
        return web.Response(status=status, text=text)


class Controller:
    """Streams the services' states as the real one does; `restarts` notes what POST /restart asked for."""

    def __init__(self, **rss_mb: float) -> None:
        self.services = {
            name: {"state": "ready", "epoch": 0, "rss_mb": rss, "log": f"logs/{name}.log"}
            for name, rss in rss_mb.items()
        }
        self.restarts: list[str] = []
        self.woken: list[dict] = []
        self.rested: list[str] = []
        self.is_full = False
        self.on_restart: Callable[[str], None] = lambda name: None
        self.rss_mb_at_start = 10.0
        self.gone = False
        self.silent = False
        self.said = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.get("/watch", self._watch), web.post("/restart/{name}", self._restart)])
        app.add_routes([web.post("/wake", self._wake), web.post("/rest", self._rest)])
        return app

    async def _wake(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.woken.append(asked)
        if self.is_full:
            return web.Response(status=507)
        for name in asked["names"]:
            self.services[name] = {"state": "ready", "epoch": 0, "rss_mb": 1.0, "log": ""}
        return web.Response()

    async def _rest(self, request: web.Request) -> web.Response:
        for name in (await request.json())["names"]:
            self.rested.append(name)
            del self.services[name]
        return web.Response()

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while not self.gone:
            if not self.silent:
                await response.write(json.dumps({"services": self.services}).encode() + b"\n")
                self.said += 1
            await asyncio.sleep(0.02)
        return response

    async def _restart(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if self.services[name]["state"] == "ready":  # else it is being restarted already
            self.restarts.append(name)
            self.on_restart(name)
            self.services[name]["state"] = "restarting"
            asyncio.get_running_loop().call_later(0.1, self.restarted, name)
        return web.Response()

    def restarted(self, name: str) -> None:
        epoch = self.services[name]["epoch"] + 1
        self.services[name] |= {"state": "ready", "epoch": epoch, "rss_mb": self.rss_mb_at_start}


@contextmanager
def playing(
    behave: Behave,
    *,
    controller: Controller | None = None,
    services: tuple[str, ...] = ("server",),
    more: Behave | None = None,
    env: dict | None = None,
    rollout: dict | None = None,
    max_steps: int | None = None,
    gateway: web.Application | None = None,
    more_gateway: web.Application | None = None,
    seen: list[Progress] | None = None,
    spare: bool = False,
):
    """A collector of one environment, with one replica, or two where `more` says how the second behaves.
    spare: whether the second one is to be woken. more_gateway: the one that serves the second one.

    seen: gets a copy of every report of progress.
    """
    agents = [Agent(one) for one in (behave, more) if one]
    config = EnvConfig(config_path="c", agent="a", timeout_s=20.0)
    for key, value in (env or {}).items():
        setattr(config, key, value)
    with ExitStack() as stack:
        replicas = []
        for index, agent in enumerate(agents):
            app = web.Application()
            app.add_routes([web.post("/run", agent.run)])
            url = stack.enter_context(serving(app))
            names = [s if index == 0 else f"{s}-{index}" for s in services]
            is_spare = spare and index > 0
            of_gateway = index if more_gateway else 0
            of_replica = {"spare": is_spare, "gateway": of_gateway}
            replicas.append(Replica(names[0], "a", url, names, names[:1], max_steps, **of_replica))
        beside: dict[str, Any] = {}
        if controller:
            beside["control_url"] = stack.enter_context(serving(controller.app()))
        if gateway:
            served = [one for one in (gateway, more_gateway) if one]
            beside["gateway_urls"] = [stack.enter_context(serving(one)) for one in served]
        if seen is not None:
            beside["report"] = lambda progress: seen.append(replace(progress))
        limits = RolloutConfig(**({"max_retries": 2} | (rollout or {})))
        collector = Collector({"e": replicas}, {"e": config}, limits, VOCAB_SIZE, **beside)
        stack.callback(collector.close)
        yield collector, *agents


@pytest.fixture(autouse=True)
def _retry_at_once(monkeypatch):
    monkeypatch.setattr(collect, "_AFTER_FAILURE_S", 0.01)


def tasks(count: int) -> list[Task]:
    return [
        Task(
            f"e/train/{i:06d}",
            "e",
            "a",
            {"key": f"e/train/{i:06d}", "responses_create_params": {"input": []}},
        )
        for i in range(count)
    ]


def play(collector: Collector, count: int = 1):
    return collector.collect(tasks(count), [SAMPLING] * count)


def only(collector: Collector):
    [outcome] = play(collector)
    return outcome


async def fine(key: str, attempt: int) -> Answer:
    return reply()


async def hang(key: str, attempt: int) -> Answer:
    await asyncio.sleep(60)
    return reply()


def always(answer: Answer) -> Behave:
    async def behave(key: str, attempt: int) -> Answer:
        return answer

    return behave


def test_outcomes_come_in_the_order_of_the_tasks_however_long_each_takes():
    async def later_first(key: str, attempt: int) -> Answer:
        number = int(key[-2:])
        await asyncio.sleep(0.2 - number / 100)
        return reply(reward=float(number))

    with playing(later_first) as (collector, _):
        outcomes = play(collector, 20)
    assert [o.rollout.reward for o in outcomes] == list(map(float, range(20)))
    assert [o.rollout.task.key for o in outcomes] == [t.key for t in tasks(20)]


def test_a_rollout_carries_its_turns_its_reward_and_items_without_tokens():
    call = turn([1, 2], [3], type="function_call", name="look")
    said = {"type": "function_call_output", "output": "seen"}
    with playing(always(reply(call, said, turn([1, 2, 3, 9], [4, 5]), reward=0.5))) as (collector, _):
        outcome = only(collector)
    assert isinstance(outcome, Completed)
    rollout = outcome.rollout
    assert [(t.prompt_ids, t.completion_ids, t.logprobs) for t in rollout.turns] == [
        ([1, 2], [3], [-0.5]),
        ([1, 2, 3, 9], [4, 5], [-0.5, -0.5]),
    ]
    assert rollout.reward == 0.5
    assert rollout.items == [{"type": "function_call", "name": "look"}, said, {"type": "message"}]
    assert rollout.seconds["total"] > 0


def test_sampling_goes_where_nemo_gym_has_it_and_the_row_stays_as_it_was():
    task = tasks(1)[0]
    task.row["responses_create_params"]["metadata"] = {"own": "kept"}
    with playing(fine) as (collector, agent):
        collector.collect([task], [SAMPLING])
    params = agent.asked[0]["responses_create_params"]
    assert (params["temperature"], params["top_p"], params["max_output_tokens"]) == (0.7, 0.9, 32)
    extra = json.loads(params["metadata"].pop("extra_body"))
    assert params["metadata"] == {"own": "kept"}
    assert extra == {"seed": 5, "play": extra["play"]} and len(extra["play"]) == 16
    assert task.row["responses_create_params"] == {"input": [], "metadata": {"own": "kept"}}


def test_a_rollout_that_failed_once_is_played_again():
    async def at_second_try(key: str, attempt: int) -> Answer:
        return reply() if attempt == 2 else (500, "first try")

    seen: list[Progress] = []
    with playing(at_second_try, seen=seen) as (collector, agent):
        outcomes = play(collector, 5)
    assert all(isinstance(o, Completed) for o in outcomes)
    assert set(agent.attempts.values()) == {2}
    last = seen[-1]
    assert (last.total, last.done, last.retried, last.failed, last.in_flight) == (5, 5, 5, 0, 0)
    assert last.tokens == 10


def test_while_rollouts_are_played_their_progress_is_told_twice_a_second_and_not_once_more_afterwards():
    seen: list[Progress] = []

    async def first_two(key: str, attempt: int) -> Answer:
        while key[-1] > "1" and not (len(seen) > 3 and seen[-1].done == 2):
            await asyncio.sleep(0.01)
        return reply()

    before = time.monotonic()
    with playing(first_two, seen=seen, rollout={"max_retries": 0}) as (collector, _):
        play(collector, 5)
        seconds = time.monotonic() - before
        wait_until(lambda: not asyncio.all_tasks(collector._loop))  # nothing is left that could tell
    assert 1.4 < seconds < 4, "four reports"
    assert [(one.total, one.in_flight, one.done, one.tokens) for one in seen[-2:]] == [
        (5, 3, 2, 4),
        (5, 0, 5, 10),
    ]
    assert before <= seen[-1].began <= before + seconds


def drawn(agent: Agent) -> list[tuple[int, str]]:
    """(seed, name of the playing) of each request that the agent got."""
    extras = [json.loads(row["responses_create_params"]["metadata"]["extra_body"]) for row in agent.asked]
    return [(extra["seed"], extra["play"]) for extra in extras]


def test_an_attempt_after_a_failure_has_a_seed_of_its_own():
    async def at_third_try(key: str, attempt: int) -> Answer:
        return reply() if attempt == 3 else (500, "not yet")

    with playing(at_third_try) as (collector, agent):
        only(collector)
    seeds, plays = zip(*drawn(agent), strict=True)
    assert seeds[0] == SAMPLING.seed
    assert len(set(seeds)) == len(set(plays)) == 3


def test_a_failed_attempt_is_not_repeated_at_once(monkeypatch):
    monkeypatch.setattr(collect, "_AFTER_FAILURE_S", AFTER_FAILURE_S)
    with playing(always((500, "no")), rollout={"max_retries": 1}) as (collector, agent):
        only(collector)
    first, second = agent.asked_at
    assert second - first >= 0.2


def test_a_failure_is_what_the_last_attempt_failed_of_and_remembers_the_others():
    async def another_each_time(key: str, attempt: int) -> Answer:
        kind = ("unknown", "token_mismatch", "engine_error")[attempt - 1]
        return 500, json.dumps({"error": {"type": kind}})

    seen: list[Progress] = []
    with playing(another_each_time, seen=seen) as (collector, _):
        outcome = only(collector)
    last = seen[-1]
    assert (last.total, last.done, last.failed, last.retried, last.in_flight) == (1, 1, 1, 2, 0)
    assert outcome.failures == ["environment", "token_mismatch", "engine"]
    assert outcome.cause == "engine" and "engine_error" in outcome.detail
    assert outcome.log == "", "nobody says where its log is"


def test_a_rollout_that_keeps_failing_is_a_failure_with_its_cause_and_the_servers_log():
    controller = Controller(server=10.0, gateway=10.0)
    with playing(always((500, "the table is gone")), controller=controller) as (collector, agent):
        wait_seen(collector, "server")
        outcome = only(collector)
    assert isinstance(outcome, Failed)
    assert outcome.cause == "environment"
    assert outcome.detail.endswith("/run answered 500: the table is gone")
    assert outcome.log == "logs/server.log"
    assert agent.attempts[outcome.task.key] == 3, "max_retries=2: three attempts"
    assert outcome.failures == ["environment"] * 3


def test_a_prompt_without_room_is_played_once_and_is_no_servers_failure():
    cut = {"incomplete_details": {"reason": "max_output_tokens"}}
    with playing(always(reply({"type": "message"}, **cut))) as (collector, agent):
        outcome = only(collector)
    assert isinstance(outcome, Failed) and outcome.cause == "prompt_too_long"
    assert agent.attempts[outcome.task.key] == 1


def test_what_the_environment_refuses_is_played_once_for_the_reward_that_is_configured():
    said = {"refused": "400: no action", "responses": [{"output": [turn([1, 2], [3])]}]}
    with playing(always((400, json.dumps(said))), env={"refused_reward": -0.5}) as (collector, agent):
        outcome = only(collector)
    assert isinstance(outcome, Completed) and outcome.rollout.reward == -0.5
    assert outcome.failures == [] and agent.attempts[outcome.rollout.task.key] == 1


def test_tokens_that_the_gateway_refused_are_a_mismatch_and_the_rollout_that_followed_remembers_it():
    async def behave(key: str, attempt: int) -> Answer:
        return (500, '{"error": {"type": "token_mismatch"}}') if attempt == 1 else reply(turn([1], [2]))

    with playing(behave) as (collector, _):
        outcome = only(collector)
    assert isinstance(outcome, Completed)
    assert outcome.failures == ["token_mismatch"]


def test_an_agent_whose_history_the_gateway_refuses_is_named():
    behave = always((500, '{"error": {"type": "token_mismatch", "message": "the history was rewritten"}}'))
    with playing(behave, rollout={"max_retries": 0}) as (collector, _):
        outcome = only(collector)
    assert outcome.cause == "token_mismatch"
    assert outcome.detail.startswith("agent a: http") and "the history was rewritten" in outcome.detail


def test_an_answer_may_come_compressed():
    """As from a server with FastAPI's GZipMiddleware, or behind a proxy."""

    async def run(request: web.Request) -> web.Response:
        response = web.json_response(reply())
        response.enable_compression()
        return response

    app = web.Application()
    app.add_routes([web.post("/run", run)])
    with serving(app) as url:
        collector = Collector(
            {"e": [Replica("server", "a", url, [], [])]},
            {"e": EnvConfig(config_path="c", agent="a")},
            RolloutConfig(max_retries=0),
            VOCAB_SIZE,
        )
        outcome = only(collector)
        collector.close()
    assert isinstance(outcome, Completed)


@pytest.mark.parametrize("padding", [0, 5000])
def test_an_engine_error_is_the_engines_however_far_into_the_answer_it_is_said(padding):
    controller = Controller(server=10.0, gateway=10.0)
    behave = always((500, "x" * padding + '{"error": {"type": "engine_error"}}'))
    with playing(behave, controller=controller, rollout={"max_retries": 0}) as (collector, _):
        wait_seen(collector, "gateway")
        outcome = only(collector)
    assert (outcome.cause, outcome.log) == ("engine", "logs/gateway.log")
    assert len(outcome.detail) < 3000


def test_an_agent_that_never_answers_is_a_timeout_within_the_deadline():
    with playing(hang, env={"timeout_s": 0.3}, rollout={"max_retries": 1}) as (collector, agent):
        began = time.monotonic()
        outcomes = play(collector, 3)
        assert time.monotonic() - began < 5
    assert [o.cause for o in outcomes] == ["timeout"] * 3
    assert "within 0.3 s" in outcomes[0].detail
    assert set(agent.attempts.values()) == {2}


@pytest.mark.parametrize(
    "answer",
    [
        "not json",
        "[]",
        '{"reward": 1.0}',
        '{"reward": 1.0, "response": {"output": ["text"]}}',
        '{"reward": 1.0, "response": {"output": 3}}',
        json.dumps(reply(turn([1], [2], prompt_token_ids=["one"]))),
    ],
)
def test_an_answer_that_is_no_rollout_is_the_environments_failure(answer):
    with playing(always(answer), rollout={"max_retries": 0}) as (collector, _):
        outcome = only(collector)
    assert isinstance(outcome, Failed)
    assert outcome.cause == "environment"
    assert "answered what is not a rollout" in outcome.detail


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("1e39", "within ±1e+16, .* got 1e+39"),
        ("-1e308", "got -1e+308"),
        ("1e999", "got inf"),
        ("1" + "0" * 400, "got 1000"),
        ("NaN", "finite .* got nan"),
        ("-Infinity", "got -inf"),
        ("null", "a number, got null, as NeMo Gym writes NaN and infinities"),
        ("true", "a number, got true"),
        ('"1.0"', 'a number, got "1.0"'),
        ('"NaN"', 'a number, got "NaN"'),
        ("[1.0]", r"a number, got \[1.0\]"),
    ],
)
def test_a_reward_that_is_no_number_to_train_on_is_the_environments_failure(reward, said):
    answer = json.dumps(reply(turn([1], [2]), reward=0.125)).replace("0.125", reward)
    with playing(always(answer), rollout={"max_retries": 0}) as (collector, _):
        outcome = only(collector)
    assert isinstance(outcome, Failed) and outcome.cause == "environment"
    named = rf"the reward that {outcome.task.agent} \(env\.{outcome.task.env}\) gave must be .*"
    assert re.search(named + said.replace("+", r"\+"), outcome.detail)


@pytest.mark.parametrize("rewards", [[1e16, -1e16] * 4, [1e16] + [0.0] * 7, [-1e16, 1.0] * 4])
def test_trl_finds_the_advantages_of_every_reward_that_is_taken(rewards):
    """TRL's own float32 arithmetic; with 1e19 in the place of 1e16 the deviation is infinite."""
    task, size = Task("e/train/0", "e", "a", {}), len(rewards)
    taken = [read_reply(task, reply(reward=r), VOCAB_SIZE, 0.0).rollout.reward for r in rewards]
    group = torch.tensor(taken * 4).view(1, size * 4)
    deviation = nanstd(group, dim=1)
    expected = torch.tensor(taken, dtype=torch.float64).repeat(4).std()
    assert deviation.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "items",
    [
        [turn([1], [2]), turn([1, 3], [4])],  # the history was rewritten
        [turn([1], [VOCAB_SIZE])],
        [turn([1], [2], generation_log_probs=[])],
        [turn([1], [2], generation_log_probs=[0.5])],
    ],
)
def test_tokens_that_contradict_each_other_are_a_mismatch_never_trained_on(items):
    with playing(always(reply(*items)), rollout={"max_retries": 0}) as (collector, _):
        outcome = only(collector)
    assert isinstance(outcome, Failed)
    assert outcome.cause == "token_mismatch"
    assert outcome.detail.startswith("agent a: turn "), "who did it, and where"


def test_an_answer_without_tokens_is_the_engines_failure():
    with playing(always(reply({"type": "message"})), rollout={"max_retries": 0}) as (collector, _):
        assert only(collector).cause == "engine"


CALL, RESULT = turn([1], [2], type="function_call"), {"type": "function_call_output"}


def test_a_rollout_cut_by_the_turn_limit_is_truncated_by_turns():
    with playing(always(reply(CALL, RESULT, reward=0.25)), max_steps=1) as (collector, _):
        outcome = only(collector)
    assert isinstance(outcome, Truncated)
    assert (outcome.limit, outcome.rollout.reward) == ("turns", 0.25)


THINKING = turn([1], [2], type="reasoning")
LENGTH = {"incomplete_details": {"reason": "max_output_tokens"}}


@pytest.mark.parametrize(
    ("answer", "max_steps", "limit"),
    [
        # simple_agent, cvdp_agent, finance_agent: the loop ends at max_steps with the last tool's result
        (reply(CALL, RESULT), 1, "turns"),
        (reply(THINKING), 1, "turns"),
        # finance_agent's tool that says it is done, aviary_agent's environment that does
        (reply(CALL, RESULT), 2, None),
        (reply(CALL, RESULT), None, None),
        # tool_simulation_agent, non_executing_simple_agent: the call is the answer
        (reply(CALL), 1, None),
        (reply(CALL), None, None),
        # an answer in the last turn allowed
        (reply(turn([1], [2])), 1, None),
        # gymnasium_agent says it itself
        (reply(turn([1], [2])) | {"truncated": True, "terminated": False}, None, "turns"),
        (reply(turn([1], [2])) | {"truncated": True, "terminated": True}, None, "turns"),
        (reply(CALL, RESULT) | {"truncated": False, "terminated": True}, 1, None),
        # the last generation was cut, whatever the environment made of it
        (reply(turn([1], [2]), **LENGTH) | {"terminated": True}, 5, "length"),
        # a full context: the model server answers with an empty message without ids
        (reply(CALL, RESULT, {"type": "message", "content": []}, **LENGTH), 5, "length"),
    ],
)
def test_an_episode_is_truncated_where_a_limit_ended_it_and_completed_where_policy_or_environment_did(
    answer, max_steps, limit
):
    with playing(always(answer), max_steps=max_steps) as (collector, _):
        outcome = only(collector)
    assert getattr(outcome, "limit", None) == limit


def test_a_rollout_cut_by_the_token_limit_is_truncated_by_length():
    cut = reply(turn([1], [2]), incomplete_details={"reason": "max_output_tokens"})
    with playing(always(cut)) as (collector, _):
        outcome = only(collector)
    assert isinstance(outcome, Truncated)
    assert outcome.limit == "length"


def test_no_more_rollouts_than_the_limit_are_in_flight():
    async def slow(key: str, attempt: int) -> Answer:
        await asyncio.sleep(0.05)
        return reply()

    with playing(slow, env={"max_concurrency": 3}) as (collector, agent):
        play(collector, 12)
    assert agent.most_in_flight == 3


def test_rollouts_are_spread_evenly_over_replicas():
    async def slow(key: str, attempt: int) -> Answer:
        await asyncio.sleep(0.2)
        return reply()

    with playing(slow, more=slow) as (collector, first, second):
        play(collector, 10)
    assert (len(first.asked), len(second.asked)) == (5, 5)


def wait_seen(collector: Collector, name: str) -> None:
    """Until the controller's first word has arrived."""
    wait_until(lambda: name in collector._services)


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)


def wait_lines(controller: Controller, count: int) -> None:
    """Until the controller has said its states `count` times more."""
    said = controller.said
    wait_until(lambda: controller.said >= said + count)


def in_background(collector: Collector, count: int) -> tuple[threading.Thread, list]:
    outcomes: list = []
    thread = threading.Thread(target=lambda: outcomes.extend(play(collector, count)), daemon=True)
    thread.start()
    return thread, outcomes


def gateway_that_says(versions_of: Callable[[list[str]], Any]) -> web.Application:
    async def versions(request: web.Request) -> web.Response:
        versions = versions_of((await request.json())["plays"])
        key = turn_key([1, 2], [3, 4])
        attempts = versions and [
            {"versions": {key: one} if one else {}, "seconds": 0.5, "usage": None} for one in versions
        ]
        return web.json_response({"attempts": attempts})

    app = web.Application()
    app.add_routes([web.post("/attempts", versions)])
    return app


def test_a_rollout_says_which_weights_sampled_it_as_the_gateway_knows_by_the_name_of_its_last_playing():
    async def at_second_try(key: str, attempt: int) -> Answer:
        return reply() if attempt == 2 else (500, "first try")

    asked: list[str] = []

    def versions_of(plays: list[str]) -> list[list[list[int]] | None]:
        asked.extend(plays)
        return [[[7, 2]], [[7, 1], [9, 1]], None]

    with playing(at_second_try, gateway=gateway_that_says(versions_of)) as (collector, agent):
        outcomes = play(collector, 3)
    assert [outcome.rollout.weights_version for outcome in outcomes] == [7, 7, None], "the oldest token's"
    assert [outcome.rollout.turns[0].versions for outcome in outcomes] == [[(7, 2)], [(7, 1), (9, 1)], []]
    assert [knows_versions(outcome) for outcome in outcomes] == [True, True, False]
    for outcome in outcomes:
        assert outcome.rollout.seconds["policy"] == 0.5
        assert 0 < outcome.rollout.seconds["queue"] < 10, "the attempt that counts is the second"
    assert set(asked) == {name for _, name in drawn(agent)[-3:]}


def test_each_gateway_is_asked_about_the_attempts_that_it_served():
    asked: list[list[str]] = [[], []]

    def versions_at(number: int) -> Callable[[list[str]], Any]:
        def versions_of(plays: list[str]) -> Any:
            asked[number] += plays
            return [[[number, 2]]] * len(plays)

        return versions_of

    gateways = [gateway_that_says(versions_at(number)) for number in range(2)]
    with playing(fine, more=fine, gateway=gateways[0], more_gateway=gateways[1]) as (collector, *agents):
        outcomes = play(collector, 6)
    for number, agent in enumerate(agents):
        assert len(agent.asked) == 3
        assert sorted(asked[number]) == sorted(name for _, name in drawn(agent))
    served_by = {"server": 0, "server-1": 1}
    assert [one.rollout.weights_version for one in outcomes] == [
        served_by[one.rollout.replica] for one in outcomes
    ]


def test_an_engine_error_names_the_log_of_the_gateway_that_served_the_rollout():
    names = ("server", "server-1", "gateway", "gateway-1")
    behave = always((500, '{"error": {"type": "engine_error"}}'))
    apps = [gateway_that_says(lambda plays: [None] * len(plays)) for _ in range(2)]
    given: dict[str, Any] = dict(zip(("gateway", "more_gateway"), apps, strict=True))
    given["controller"] = Controller(**dict.fromkeys(names, 10.0))
    with playing(behave, more=behave, rollout={"max_retries": 0}, **given) as (collector, *_):
        wait_seen(collector, "gateway-1")
        outcomes = play(collector, 2)
    assert [outcome.cause for outcome in outcomes] == ["engine"] * 2
    assert sorted(outcome.log for outcome in outcomes) == ["logs/gateway-1.log", "logs/gateway.log"]


def test_a_gateway_that_does_not_say_which_weights_sampled_ends_the_run():
    with (
        playing(fine, gateway=web.Application()) as (collector, _),
        pytest.raises(ServiceError, match="the gateway did not say which weights sampled"),
    ):
        play(collector, 1)


@pytest.mark.parametrize("versions", [[[[7, 2]]], [[[7, 2]]] * 3, None])
def test_a_gateway_that_answers_for_more_or_fewer_rollouts_than_it_was_asked_about_ends_the_run(versions):
    with (
        playing(fine, gateway=gateway_that_says(lambda plays: versions)) as (collector, _),
        pytest.raises(ServiceError, match="the gateway did not say which weights sampled"),
    ):
        play(collector, 2)


def test_a_rollout_whose_server_was_restarted_is_played_again_and_is_no_failure():
    async def lost_at_first(key: str, attempt: int) -> Answer:
        if attempt == 1:
            await asyncio.sleep(60)
        return reply()

    controller = Controller(server=10.0)
    seen: list[Progress] = []
    with playing(lost_at_first, controller=controller, rollout={"max_retries": 0}, seen=seen) as (
        collector,
        agent,
    ):
        wait_seen(collector, "server")
        thread, outcomes = in_background(collector, 4)
        wait_until(lambda: agent.in_flight == 4)
        controller.services["server"] |= {"state": "down", "epoch": 1}
        wait_until(lambda: agent.in_flight == 0)
        time.sleep(0.1)
        assert len(agent.asked) == 4, "nothing is sent to a server that is down"
        controller.services["server"]["state"] = "ready"
        thread.join(10)
    assert [type(o) for o in outcomes] == [Completed] * 4
    assert set(agent.attempts.values()) == {2}
    assert {seed for seed, _ in drawn(agent)} == {SAMPLING.seed}, "it draws what it would have drawn"
    assert len({play for _, play in drawn(agent)}) == 8
    assert seen[-1].failed == 0


def test_while_a_replica_is_down_the_other_one_plays():
    controller = Controller(**{"server": 10.0, "server-1": 10.0})
    controller.services["server"]["state"] = "down"
    with playing(fine, more=fine, controller=controller) as (collector, first, second):
        wait_seen(collector, "server")
        outcomes = play(collector, 6)
    assert all(isinstance(o, Completed) for o in outcomes)
    assert (len(first.asked), len(second.asked)) == (0, 6)


def test_a_run_of_a_thousand_services_is_watched_as_one_of_two():
    """aiohttp's own limit for a line is half a MiB."""
    controller = Controller(**{f"environment-{n}-{'x' * 300}": 10.0 for n in range(1000)}, server=10.0)
    assert len(json.dumps(controller.services)) > 2**19
    with playing(fine, controller=controller) as (collector, _):
        wait_seen(collector, "server")


def test_states_that_cannot_be_read_end_the_collection_instead_of_leaving_it_without_them():
    controller = Controller(server=10.0)
    controller.services["server"] = {"state": "ready"}
    with playing(fine, controller=controller) as (collector, _):
        wait_until(lambda: collector._lost_control)
        with pytest.raises(ControllerGone, match="KeyError: 'epoch'"):
            play(collector, 2)


def test_a_replica_above_its_memory_budget_is_restarted_when_its_last_rollout_has_landed():
    controller = Controller(**{"server": 10.0, "server-1": 10.0})
    release = threading.Event()

    async def held(key: str, attempt: int) -> Answer:
        while not release.is_set():
            await asyncio.sleep(0.01)
        return reply()

    in_flight_at_restart: list[int] = []
    with playing(held, more=held, controller=controller, env={"memory_budget_mb": 100.0}) as (
        collector,
        first,
        second,
    ):
        controller.on_restart = lambda name: in_flight_at_restart.append(first.in_flight)
        wait_seen(collector, "server")
        thread, outcomes = in_background(collector, 4)
        wait_until(lambda: first.in_flight == 2 and second.in_flight == 2)
        controller.services["server"]["rss_mb"] = 500.0
        wait_until(lambda: collector._seats["e"][0].draining)
        another_thread, more = in_background(collector, 6)
        wait_until(lambda: first.in_flight + second.in_flight == 10)
        assert first.in_flight == 2, "it gets no new rollouts"
        assert controller.restarts == [], "two rollouts are still in flight there"
        controller.silent = True
        release.set()
        wait_until(lambda: controller.restarts == ["server"])  # not only once the controller speaks again
        controller.silent = False
        thread.join(10)
        another_thread.join(10)
        wait_until(lambda: not collector._seats["e"][0].draining)
        asked = len(first.asked) + len(second.asked)
        assert asked == 10, "nothing was lost, nothing played twice"
        more += play(collector, 4)
    assert controller.restarts == ["server"]
    assert in_flight_at_restart == [0]
    assert [type(o) for o in outcomes + more] == [Completed] * 14
    assert len(first.asked) > 2, "it takes part again"


def test_a_replica_that_is_above_its_budget_from_its_start_plays_a_rollout_before_each_restart():
    controller = Controller(server=500.0)
    controller.rss_mb_at_start = 500.0
    with playing(fine, controller=controller, env={"memory_budget_mb": 100.0}) as (collector, _):
        [seat] = collector._seats["e"]
        for restarts in range(3):
            wait_until(lambda number=restarts: seat.epochs == (number,))
            wait_lines(controller, 5)
            assert len(controller.restarts) == restarts
            assert isinstance(only(collector), Completed)


def test_a_replica_at_its_memory_budget_plays_on():
    controller = Controller(server=100.0)
    with playing(fine, controller=controller, env={"memory_budget_mb": 100.0}) as (collector, _):
        wait_seen(collector, "server")
        only(collector)
        wait_lines(controller, 5)
        assert controller.restarts == []
        controller.services["server"]["rss_mb"] = 100.1
        wait_until(lambda: controller.restarts == ["server"])


def test_stopping_raises_promptly_and_refuses_more():
    with playing(hang) as (collector, agent):
        threading.Timer(0.3, collector.stop).start()
        began = time.monotonic()
        with pytest.raises(Stopped):
            play(collector, 5)
        assert time.monotonic() - began < 3
        wait_until(lambda: agent.in_flight == 0)
        with pytest.raises(Stopped):
            play(collector)


def test_a_controller_that_is_gone_ends_the_collection():
    controller = Controller(server=10.0)
    with playing(hang, controller=controller) as (collector, _):
        wait_seen(collector, "server")
        began = time.monotonic()
        threading.Timer(0.3, setattr, (controller, "gone", True)).start()
        with pytest.raises(ServiceError, match=r"^the controller is gone: it closed the connection$"):
            play(collector, 3)
        assert time.monotonic() - began < 5


def test_meanwhile_is_called_in_the_callers_thread_until_the_last_outcome_and_may_end_the_collection(
    monkeypatch,
):
    monkeypatch.setattr(collect, "_MEANWHILE_S", 0.01)
    threads: list[threading.Thread] = []

    async def until_called(key: str, attempt: int) -> Answer:
        while len(threads) < 3:
            await asyncio.sleep(0.01)
        return reply()

    with playing(until_called) as (collector, _):
        [outcome] = collector.collect(
            tasks(1), [SAMPLING], lambda: threads.append(threading.current_thread())
        )
    assert isinstance(outcome, Completed) and set(threads) == {threading.current_thread()}

    def give_up() -> None:
        wait_until(lambda: agent.in_flight == 2)
        raise ServiceError("the engine is gone")

    with playing(hang) as (collector, agent):
        with pytest.raises(ServiceError, match="the engine is gone"):
            collector.collect(tasks(2), [SAMPLING] * 2, give_up)
        wait_until(lambda: agent.in_flight == 0)


def test_a_rollout_that_cannot_even_be_asked_for_ends_the_others_too():
    broken = Task("e/train/000009", "e", "a", {"key": "no parameters"})
    with playing(hang, env={"timeout_s": 0.3}, rollout={"max_retries": 20}) as (collector, agent):
        with pytest.raises(KeyError, match="responses_create_params"):
            collector.collect([*tasks(2), broken], [SAMPLING] * 3)
        assert len(agent.asked) <= 2, "nothing was played again"
        with pytest.raises(ValueError):
            collector.collect(tasks(2), [SAMPLING])


def test_a_closed_collector_leaves_nothing_behind_and_one_that_is_not_closed_does_not_hold_its_process():
    before = set(threading.enumerate())
    collector = Collector({}, {}, RolloutConfig(), VOCAB_SIZE)
    [thread] = set(threading.enumerate()) - before
    assert thread.daemon
    assert collector.collect([], []) == []
    collector.close()
    assert not thread.is_alive() and collector._http.closed


def failed(cause, key: str = "e/train/000001") -> Failed:
    return Failed(Task(key, key.split("/")[0], "a", {}), cause, "it said no", f"logs/{cause}.log")


def completed() -> Completed:
    return Completed(Rollout(Task("e/train/000000", "e", "a", {}), [], 1.0, []))


def test_too_many_failures_name_the_commonest_cause_an_example_and_its_log():
    outcomes = [completed()] * 5 + [failed("timeout", "f/train/1")] + [failed("engine")] * 2
    with pytest.raises(RolloutError) as caught:
        check_failed_share(outcomes, 0.3)
    said = str(caught.value)
    assert "3 of 8 rollouts failed, more than rollout.max_failed_share=0.3 allows" in said
    assert "Most often (2): engine in env.e, for example e/train/000001: it said no" in said
    assert "logs/engine.log" in said


@pytest.mark.parametrize(("failures", "share"), [(0, 0.0), (2, 0.2), (10, 1.0)])
def test_failures_within_the_allowed_share_pass(failures, share):
    check_failed_share([failed("engine")] * failures + [completed()] * (10 - failures), share)


def test_prompts_without_room_end_a_run_only_where_nothing_else_was_played():
    check_failed_share([failed("prompt_too_long")] * 9 + [completed()], 0.0)
    with pytest.raises(RolloutError, match=r"prompt_too_long in env\.e"):
        check_failed_share([failed("prompt_too_long")] * 9, 0.2)


def test_while_rollouts_are_out_failures_are_a_share_of_all_that_will_land():
    check_failed_share([failed("engine")] * 2, 0.2, total=10)
    check_failed_share([failed("prompt_too_long")] * 9, 0.2, total=10)
    with pytest.raises(RolloutError, match="3 of 10 rollouts failed"):
        check_failed_share([failed("engine")] * 3, 0.2, total=10)


def test_no_failure_is_allowed_with_a_share_of_zero():
    with pytest.raises(RolloutError):
        check_failed_share([failed("engine")] + [completed()] * 99, 0.0)


def test_as_many_rollouts_as_the_configuration_allows_are_in_flight_and_each_has_its_own_deadline_alone():
    """Not as many as an HTTP client allows by itself (100), nor as long."""
    agents: list[Agent] = []

    async def until_all_are_there(key: str, attempt: int) -> Answer:
        while agents[0].most_in_flight < 120:
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.2)
        return reply()

    with playing(until_all_are_there, env={"max_concurrency": 120}, rollout={"max_retries": 0}) as (
        collector,
        agent,
    ):
        agents.append(agent)
        outcomes = play(collector, 120)
    assert {type(outcome) for outcome in outcomes} == {Completed}


CORE = threading.Lock()


async def in_turn(key: str, attempt: int) -> Answer:
    """One rollout after the other, of both replicas: as servers that share one core play them."""

    def work() -> None:
        with CORE:
            time.sleep(0.04)

    await asyncio.to_thread(work)
    return reply()


def test_a_spare_replica_is_woken_for_the_next_collection_and_rests_if_it_did_not_help(caplog, monkeypatch):
    """Both replicas share one core. Others use the machine too, so the collections' seconds are set here."""
    caplog.set_level(logging.INFO)
    measure = spare_replicas.paces_of
    monkeypatch.setattr(
        spare_replicas,
        "paces_of",
        lambda outcomes: {env: replace(pace, seconds=0.3) for env, pace in measure(outcomes).items()},
    )
    controller = Controller(server=10.0)
    with playing(in_turn, more=in_turn, controller=controller, spare=True) as (collector, first, second):
        assert len(play(collector, 6)) == 6
        assert len(second.asked) == 0 and controller.woken == [{"names": ["server-1"], "twins": ["server"]}]
        time.sleep(0.3)  # the collector is told that it is ready
        assert len(play(collector, 6)) == 6
        assert len(second.asked) == 3 and controller.rested == ["server-1"]
        assert len(play(collector, 6)) == 6
        assert (len(first.asked), len(second.asked)) == (6 + 3 + 6, 3)
    assert "env.e has 2 replicas from now on, 1 before (6 rollouts in 0." in caplog.text
    assert "env.e has 1 replicas from now on, 2 before" in caplog.text


def test_without_memory_for_a_spare_replica_the_run_goes_on_with_what_it_has(caplog):
    caplog.set_level(logging.INFO)
    controller = Controller(server=10.0)
    controller.is_full = True
    with playing(in_turn, more=in_turn, controller=controller, spare=True) as (collector, _, second):
        assert len(play(collector, 3)) == len(play(collector, 3)) == 3
        assert len(second.asked) == 0 and len(controller.woken) == 1, "it is not asked for again at once"
    assert "env.e stays at 1 replicas: too little memory is free for more" in caplog.text
