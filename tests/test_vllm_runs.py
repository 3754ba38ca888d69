"""Whole runs with the real vLLM, on a CPU: ids, log-probabilities and weights go round exactly."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
import urllib.request

import pytest
from whole_run import BATCH, STEPS, Run

from gymexp.run.keys import header

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
]


CHANGES = ["rollout.drift_every=1", "rollout.max_drift=3e-4", "trainer.max_steps=3", "trainer.warmup_steps=0"]
CHANGES += ["evaluation.every_steps=0", "evaluation.before=false"]


def check(run: Run) -> None:
    """Three steps, every rollout played, with weights that went round exactly."""
    assert run.ended() == 0, run.said
    entries = [entry for entry in run.metrics() if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert entry["drift"] < 3e-4, "before the first update and after each"
        assert entry["sudoku/failed"] == entry["workplace/failed"] == 0
        assert entry["sudoku/token_mismatches"] == entry["workplace/token_mismatches"] == 0
        assert entry["workplace/turns"] > 1, "tool results came back, and the prompts went on exactly"
        assert (entry["time/sync"] > 0) == (entry["step"] > 1)
        assert 0.99 < entry["sampling/importance_sampling_ratio/mean"] < 1.01
    assert run.left() == []
    assert not (run.directory / "weights").exists(), "what weights were sent through is cleared away"


def test_an_adapter_is_trained_on_what_vllm_samples_and_a_client_that_hangs_up_frees_it(
    started, gym_python, vllm
):
    changes = ["model.lora.r=4", "trainer.learning_rate=1e-2", "evaluation.num_tasks=2"]
    run = started("vllm", *vllm, *CHANGES, *changes, "engine.args.enable_log_requests=true")
    run.wait_for_step(1)
    services = json.loads((run.directory / "services.json").read_text())
    # Hot, so that few of them end by themselves before their client has gone.
    body = {"model": "policy", "temperature": 2.0, "messages": [{"role": "user", "content": "."}]}
    url, data = f"{services['gateway_url']}/v1/chat/completions", json.dumps(body).encode()
    key = header(run.keys().policy)
    for _ in range(8):
        with contextlib.suppress(TimeoutError):
            urllib.request.urlopen(urllib.request.Request(url, data, key), timeout=0.3).close()
    log = run.directory / "logs" / "vllm-0.log"
    run.wait_for(lambda: re.search(r"Request \S+ aborted", log.read_text()))
    check(run)


def test_a_vllm_that_dies_while_it_samples_comes_back_with_the_policys_weights_and_no_rollout_is_lost(
    started, gym_python, vllm
):
    run = started("vllm_killed", *vllm, *CHANGES, "evaluation.after=false")
    run.wait_for(lambda: 1 in run.steps() and run.status().get("in_flight"))
    engine = next(p for p in run.left() if "EngineCore" in "".join(p.cmdline()))
    engine.kill()
    check(run)
    assert "vllm-0 exited with code" in run.said and "starting it again" in run.said
    assert "is back, with the weights of step 1" in (run.directory / "logs" / "trainer.log").read_text()


@pytest.fixture
def two_ranks(vllm, monkeypatch) -> list[str]:
    """The placement takes these names for GPUs; torch and vLLM, which are for CPUs here, know of none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    changes = ["placement.rollout_gpus=1", "placement.train_gpus=2", "engine.weights=disk"]
    changes += ["rollout.drift_every=1", "rollout.max_drift=3e-4", "trainer.warmup_steps=0"]
    return [*vllm, *changes, "evaluation.before=false", "evaluation.after=false"]


@pytest.mark.ranks
def test_two_ranks_train_as_one_end_with_a_checkpoint_when_asked_and_go_on(started, gym_python, two_ranks):
    run = started("ranks", *two_ranks)
    run.wait_for_step(1)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.ended() == 128 + signal.SIGTERM, run.said
    assert "go on with: python -m gymexp.train" in run.said and run.left() == []
    resumed = started("ranks", resume=True)
    assert resumed.ended() == 0, resumed.said
    assert resumed.steps() == list(range(1, STEPS + 1)), "none twice"
    assert len(resumed.task_keys(1)) == 2 * BATCH
    drifts = [entry["drift"] for entry in resumed.metrics() if "drift" in entry]
    assert len(drifts) == STEPS and max(drifts) < 3e-4
    assert resumed.left() == []


@pytest.mark.ranks
def test_a_rank_that_dies_ends_the_run_with_its_name(started, gym_python, two_ranks):
    run = started("dead_rank", *two_ranks, "trainer.max_steps=100")
    run.wait_for_step(1)
    began = time.monotonic()
    run.server("trainer-1").kill()
    assert run.ended() == 1
    assert time.monotonic() - began < 60
    assert "trainer-1 was ended by SIGKILL. The end of" in run.said
    assert run.left() == []


def test_a_vllm_that_cannot_start_ends_the_run_with_what_to_do_about_it(started, gym_python, vllm):
    run = started("no_vllm", *vllm, "engine.args.no_such_flag=1")
    assert run.ended() == 1
    assert "vllm-0 exited with code" in run.said
    assert "engine.args holds a flag that this `vllm serve` does not know" in run.said
    assert "--no-such-flag" in run.said
    assert "Traceback" not in run.said.split("The end of")[0]
    assert run.left() == []
