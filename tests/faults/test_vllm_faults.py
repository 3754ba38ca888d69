"""Whole runs with the real vLLM on a CPU: it dies, hangs, cannot start, or loses a rank it samples for."""

from __future__ import annotations

import psutil
import pytest
from vllm_cpu import SAMPLED, check

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(900)]


def test_a_vllm_that_dies_and_one_that_hangs_come_back_with_the_policys_weights_and_no_rollout_is_lost(
    started, gym_python, vllm, fault
):
    changes = ["evaluation.after=false", "gym.health_interval_s=1", "gym.health_timeout_s=20"]
    run = started("vllm_killed", *vllm, *SAMPLED, *changes)
    run.wait_for(lambda: 1 in run.steps() and run.status().get("in_flight"))
    engine = next(p for p in run.left() if "EngineCore" in "".join(p.cmdline()))
    blow = fault("vLLM is killed while it samples")
    engine.kill()
    run.wait_for(lambda: "is back, with the weights of step 1" in run.log("trainer"))
    blow.over()
    run.wait_for(lambda: 2 in run.steps() and run.status().get("in_flight"))
    blow = fault("vLLM hangs")
    next(p for p in run.left() if run.writes(p, "vllm-0") and listens(p)).suspend()
    run.wait_for(lambda: "is back, with the weights of step 2" in run.log("trainer"))
    blow.over()
    check(run)
    assert "vllm-0 exited with code" in run.said and "starting it again" in run.said
    assert "vllm-0 has not answered for" in run.said and "Traceback" not in run.said


def listens(process: psutil.Process) -> bool:
    return any(one.status == psutil.CONN_LISTEN for one in process.net_connections("tcp"))


@pytest.mark.ranks
def test_a_rank_that_dies_ends_the_run_with_its_name(started, gym_python, two_ranks, fault):
    run = started("dead_rank", *two_ranks, "trainer.max_steps=100")
    run.wait_for_step(1)
    blow = fault("A training rank is killed")
    run.server("trainer-1").kill()
    assert run.ended_cleanly() == 1
    assert blow.over() < 60
    assert "trainer-1 was ended by SIGKILL. The end of" in run.said


def test_a_vllm_that_cannot_start_ends_the_run_with_what_to_do_about_it(started, gym_python, vllm, fault):
    blow = fault("vLLM cannot start")
    run = started("no_vllm", *vllm, "engine.args.no_such_flag=1")
    assert run.ended_cleanly() == 1
    blow.over()
    assert "vllm-0 exited with code" in run.said
    assert "engine.args has a flag that this `vllm serve` does not know" in run.said
    assert "--no-such-flag" in run.said
