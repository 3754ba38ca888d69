"""Whole runs on GPUs with the real vLLM: weights by NCCL and CUDA IPC, several replicas, several ranks.

`GYMEXP_OVERRIDES` says what is particular to the machine, e.g. "engine.python=… gym.python=…".
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import sys

import pytest
import torch
from whole_run import Run

GPUS = torch.cuda.device_count()
MACHINE = shlex.split(os.environ.get("GYMEXP_OVERRIDES", ""))
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux" or not GPUS, reason="needs NVIDIA GPUs"),
]
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
with_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")


@pytest.fixture
def vllm_run(started):
    """Start a run with vLLM. bf16 on both sides: hence the wider drift."""
    changes = ["engine=vllm", "engine.args.enforce_eager=true", "model.dtype=bfloat16"]
    changes += ["rollout.drift_every=1", "rollout.max_drift=0.02", "trainer.max_steps=3"]
    changes += ["trainer.warmup_steps=0", "evaluation.num_tasks=2", "evaluation.every_steps=0"]
    return lambda name, *overrides: started(name, *changes, *MACHINE, *overrides)


def check(run: Run, max_drift: float = 0.02) -> None:
    assert run.ended() == 0, run.said
    entries = [entry for entry in run.metrics() if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert entry["sudoku/failed"] == entry["workplace/failed"] == 0
        assert entry["drift"] < max_drift
    assert run.left() == []


@two_gpus
def test_one_gpu_samples_and_one_trains_and_weights_go_by_nccl(vllm_run):
    run = vllm_run("nccl", "engine.weights=nccl")
    check(run)


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])


def test_one_gpu_samples_and_trains_in_turn_and_weights_go_by_cuda_ipc(vllm_run, one_gpu):
    run = vllm_run("ipc", "engine.weights=ipc", "engine.args.gpu_memory_utilization=0.3")
    check(run)
    log = (run.directory / "logs" / "vllm-0.log").read_text()
    assert "sleep" in log.lower() and "wake" in log.lower()


def test_an_adapter_is_trained_in_float32_and_both_sides_agree_after_every_update(vllm_run, one_gpu):
    changes = ["model.dtype=float32", "model.lora.r=8", "trainer.learning_rate=1e-2"]
    run = vllm_run("float32", *changes, "engine.weights=ipc", "engine.args.gpu_memory_utilization=0.3")
    check(run, max_drift=1e-3)
    assert (run.directory / "adapter" / "adapter_model.safetensors").exists()


def test_vllm_samples_with_an_adapter_that_it_gets_after_every_update(vllm_run, one_gpu):
    """In bfloat16: vLLM's kernels for adapters have no float32 on a GPU."""
    changes = ["model.lora.r=8", "model.lora.sync=adapter", "trainer.learning_rate=1e-2"]
    run = vllm_run("sent_adapter", *changes, "engine.args.gpu_memory_utilization=0.3")
    check(run)
    assert (run.directory / "adapter" / "adapter_model.safetensors").exists()


@two_gpus
def test_two_replicas_and_two_ranks_share_two_gpus(vllm_run):
    run = vllm_run("shared", "engine.colocate=true", "engine.args.gpu_memory_utilization=0.3")
    check(run)


@two_gpus
def test_a_vllm_that_dies_comes_back_into_the_nccl_group(vllm_run):
    slowly = [f"env.{env}.max_concurrency=1" for env in ("sudoku", "workplace")]  # it dies in mid-step
    unevaluated = ["evaluation.before=false", "evaluation.after=false"]
    run = vllm_run("killed", "engine.weights=nccl", *unevaluated, *slowly)
    run.wait_for(lambda: 1 in run.steps() and run.status().get("in_flight"))
    next(p for p in run.left() if "EngineCore" in "".join(p.cmdline())).kill()
    check(run)
    assert "starting it again" in run.said


@pytest.fixture
def sharded_run(vllm_run):
    """Both GPUs sample and train, and the policy is spread over them."""
    changes = ["engine.colocate=true", "engine.args.gpu_memory_utilization=0.3"]
    return lambda name, *overrides: vllm_run(name, *changes, *overrides)


@two_gpus
def test_fsdp_trains_ends_with_a_checkpoint_of_shards_when_asked_and_goes_on(sharded_run, started):
    run = sharded_run("fsdp", "trainer.fsdp=true", "evaluation.after=false")
    run.wait_for_step(1)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.ended() == 128 + signal.SIGTERM, run.said
    assert list((run.directory / "checkpoints").glob("checkpoint-*/pytorch_model_fsdp_0/*.distcp"))
    check(started("fsdp", resume=True))
    assert (run.directory / "model" / "model.safetensors").exists()


@two_gpus
@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_an_adapter_is_trained_with_fsdp_and_one_replica_has_both_gpus(sharded_run, sync):
    dtype, drift = ("float32", 1e-3) if sync == "merged" else ("bfloat16", 0.02)
    changes = [f"model.dtype={dtype}", "model.lora.r=8", "trainer.learning_rate=1e-2", "trainer.fsdp=true"]
    changes += [f"model.lora.sync={sync}", "engine.tensor_parallel_size=2", "evaluation.before=false"]
    run = sharded_run(f"fsdp_{sync}", *changes)
    check(run, max_drift=drift)
    assert (run.directory / "adapter" / "adapter_model.safetensors").exists()


@two_gpus
@with_deepspeed
def test_zero_2_trains(sharded_run):
    changes = ["trainer.deepspeed.zero_optimization.stage=2", "trainer.save_steps=3"]
    run = sharded_run("zero2", *changes, "evaluation.before=false", "evaluation.after=false")
    check(run)


@two_gpus
@with_deepspeed
def test_zero_3_trains_beside_a_reference_ends_with_a_checkpoint_when_asked_and_goes_on(sharded_run, started):
    changes = ["trainer.deepspeed.zero_optimization.stage=3", "trainer.beta=0.01"]
    run = sharded_run("zero3", *changes, "evaluation.after=false")
    run.wait_for_step(1)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.ended() == 128 + signal.SIGTERM, run.said
    check(started("zero3", resume=True))
    assert (run.directory / "model" / "model.safetensors").exists()
