"""Two ranks of the trainer on CPUs, whose policy is spread over both, as FSDP2 or DeepSpeed do it."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from whole_run import ROOT

PATIENCE_S = 200
TRAINER = {
    "logging_steps": 1,
    "max_steps": 2,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
}
ZERO_3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}
with_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")


def train(directory: Path, until: int, trainer: dict, **more: object) -> None:
    """Two ranks, up to step `until`, from the newest checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = json.dumps({"trainer": TRAINER | trainer} | more)
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    common |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    logs = [directory / f"rank{rank}.log" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [
            sys.executable,
            ROOT / "tests" / "training" / "sharded_rank.py",
            options,
            directory,
            str(until),
        ]
        env = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as out:
            ranks.append(subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=env))
    try:
        codes = [rank.wait(PATIENCE_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
