"""A judge on loopback that goes down and comes back, and the settings of a run with it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from aiohttp import web
from loopback import serving

ENV = "over_refusal_detection"
KEY = "a-key-of-the-judge-7c41"
KEY_ENV = "MY_JUDGE_KEY"
QUICKSTART = ("sudoku", "workplace")  # the environments of the other settings of a run
REWARDS = {"[[COMPLIED]]": 0.75, "[[REFUSED]]": 0.25}
UNCLEAR = 0.5  # what NeMo Gym's server gives for a judge without a verdict
_NUMBER = re.compile(r"verdict (\d+)")


class Judge:
    """An OpenAI-compatible server on one port. Every second verdict is the other one, and each has a number.

    given: the verdicts by their numbers. keys: the keys that it was sent. asked: the number of requests, also
    of those that it did not get to answer. pause_s: before each answer.
    """

    def __init__(self) -> None:
        self.given: dict[int, str] = {}
        self.keys: set[str | None] = set()
        self.asked, self.pause_s = 0, 0.0
        self._up = ExitStack()
        self.up()

    def up(self) -> None:
        port = int(self.url.rpartition(":")[2]) if hasattr(self, "url") else 0
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", self._complete)])
        self.url = self._up.enter_context(serving(app, port))

    def down(self) -> None:
        """Nobody listens on its port from now on; its open requests are cut."""
        self._up.close()

    async def _complete(self, request: web.Request) -> web.Response:
        self.keys.add(request.headers.get("Authorization"))
        self.asked += 1
        await asyncio.sleep(self.pause_s)
        number = len(self.given)
        self.given[number] = verdict = list(REWARDS)[number % 2]
        message = {"role": "assistant", "content": f"This is verdict {number}.\n{verdict}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        about = {"id": "j", "object": "chat.completion", "created": 1, "model": "wise"}
        return web.json_response(about | {"choices": [choice]})


@contextmanager
def judging() -> Iterator[Judge]:
    judge = Judge()
    try:
        yield judge
    finally:
        judge.down()


def settings(judge: Judge, *others: str) -> list[str]:
    """Overrides of a run whose judged environment this judge judges. others: environments beside it."""
    keys = ["weight=1", "max_output_tokens=8", "data.validation_share=0.4", f"judge.url={judge.url}/v1"]
    keys += ["judge.model=wise", f"judge.key_env={KEY_ENV}", f"servers.{ENV}.reward_if_unclear={UNCLEAR}"]
    keys += [
        f"servers.{ENV}.reward_if_{word}={REWARDS[f'[[{word.upper()}]]']}" for word in ("complied", "refused")
    ]
    return [f"env=[{','.join((*others, ENV))}]", *(f"env.{ENV}.{key}" for key in keys)]


def check_verdicts(judge: Judge, outcomes: list[dict]) -> list[int]:
    """Checks that each reward of the judged environment is that of a verdict which the judge gave, and no
    verdict is used twice. Returns the verdicts' numbers."""
    numbers = []
    for outcome in outcomes:
        rollout = outcome.get("rollout")
        if not rollout or rollout["task"]["env"] != ENV:
            continue
        said = rollout["verdict"].get("judge_evaluation")
        if said is None:  # the policy said nothing, of which the server asks no judge
            assert rollout["reward"] == 0.0 and not rollout["verdict"].get("model_response_text"), rollout
            continue
        assert said["response"], f"a verdict that nobody gave: {rollout}"
        [number] = map(int, _NUMBER.findall(said["response"]["output"][-1]["content"][-1]["text"]))
        assert rollout["reward"] == REWARDS[judge.given[number]], rollout
        numbers.append(number)
    assert len(set(numbers)) == len(numbers), "one verdict for two rollouts"
    return numbers
