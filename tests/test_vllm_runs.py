"""Whole runs with the real vLLM, on a CPU: ids, log-probabilities and weights go round exactly."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import urllib.request

import pytest
from safetensors.torch import load_file
from vllm_cpu import SAMPLED, check
from whole_run import BATCH, STEPS

from gymexp.processes.access_keys import header

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
]


def test_an_adapter_is_trained_on_what_vllm_samples_and_a_client_that_hangs_up_frees_it(
    started, gym_python, vllm
):
    changes = ["model.lora.r=4", "trainer.learning_rate=1e-2", "evaluation.num_tasks=2"]
    run = started("vllm", *vllm, *SAMPLED, *changes, "engine.args.enable_log_requests=true")
    run.wait_for_step(1)
    services = json.loads((run.directory / "services.json").read_text())
    # Hot, so that few of them end by themselves before their client has gone.
    body = {"model": "policy", "temperature": 2.0, "messages": [{"role": "user", "content": "."}]}
    url, data = f"{services['gateway_urls'][0]}/v1/chat/completions", json.dumps(body).encode()
    key = header(run.keys().policy)
    for _ in range(8):
        with contextlib.suppress(TimeoutError):
            urllib.request.urlopen(urllib.request.Request(url, data, key), timeout=0.3).close()
    log = run.directory / "logs" / "vllm-0.log"
    run.wait_for(lambda: re.search(r"Request \S+ aborted", log.read_text()))
    check(run)


def test_an_adapter_goes_to_vllm_as_one_and_a_vllm_that_is_killed_comes_back_with_it(
    started, gym_python, vllm
):
    changes = ["model.lora.r=4", "model.lora.sync=adapter", "trainer.learning_rate=1e-2"]
    run = started("adapter", *vllm, *SAMPLED, *changes, "evaluation.after=false")
    run.wait_for(lambda: 1 in run.steps() and run.status().get("in_flight"))
    next(p for p in run.left() if "EngineCore" in "".join(p.cmdline())).kill()
    run.wait_for(lambda: "is back, with the weights of step 1" in run.log("trainer"))
    check(run, sends_first=True)
    assert "starting it again" in run.said
    log = run.log("vllm-0")
    loaded = re.findall(r"Loaded new LoRA adapter: name '(policy-\d)'", log)
    assert loaded == ["policy-0", "policy-1", "policy-1", "policy-2"], "once each, and again for the new vLLM"
    assert "POST /collective_rpc" not in log, "no other weights were sent"
    adapter = load_file(run.directory / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in adapter.values()), "it has learned, so the drift saw it"


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
