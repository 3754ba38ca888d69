"""A whole run whose rollouts reach the engine through two gateways; one is killed in the middle, and then the
engine."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter

import pytest
from whole_run import UNEVALUATED, alive

STEPS = 12
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


def spans_of(line: dict) -> list[list[list[int]]]:
    return [turn["versions"] for turn in line["rollout"]["turns"]]


def test_two_gateways_lose_no_token_if_one_of_them_and_the_engine_are_killed(started):
    length = f"trainer.max_steps={STEPS}"
    run = started("gateways", length, "gym.model_servers=2", "overlap.max_staleness=2", *UNEVALUATED)
    run.wait_for_step(1)

    def kill(name: str) -> None:
        killed = run.server(name)
        killed.kill()
        run.wait_for(lambda: not alive(killed) and run.status()["services"][name] == "ready")

    kill("gateway-1")
    back_at = time.time()
    run.wait_for_step(max(run.steps()) + 2)
    assert "is back, with the weights" not in run.log("trainer"), "the first gateway had the engine open"
    kill("hf-0")
    assert max(run.steps()) < STEPS - 1, "the run goes on with the new one"
    assert run.ended_cleanly() == 0, run.said
    for name in ("gateway-1", "hf-0"):
        assert f"{name} was ended by SIGKILL; starting it again" in run.said
    assert run.log("trainer").count("is back, with the weights") == 1

    ages = Counter[int]()
    began: dict[str, list[float]] = {}  # by replica
    for step in range(1, STEPS + 1):
        for line in run.rollouts(f"step-{step:06d}"):
            assert line["outcome"] != "failed", line
            for turn, of_turn in zip(line["rollout"]["turns"], spans_of(line), strict=True):
                assert sum(count for _, count in of_turn) == len(turn["completion_ids"])
                ages.update({step - 1 - version: count for version, count in of_turn})
            began.setdefault(line["rollout"]["replica"], []).append(line["rollout"]["began"])
    assert 0 <= min(ages) <= max(ages) <= 2
    entries = [entry for entry in run.metrics() if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    assert max(entry["drift"] for entry in entries if "drift" in entry) < 0.001

    # The first environment's only replica asks the first gateway, the next replica the second one.
    services = json.loads((run.directory / "services.json").read_text())
    gateway_of = {one["name"]: one["gateway"] for of_env in services["replicas"].values() for one in of_env}
    assert gateway_of == {
        "sudoku-reasoning_gym_simple_agent": 0,
        "workplace-workplace_assistant_simple_agent-0": 1,
        "workplace-workplace_assistant_simple_agent-1": 0,
    }
    of_second = began["workplace-workplace_assistant_simple_agent-0"]
    assert min(of_second) < back_at < max(of_second), "it plays before and after"
