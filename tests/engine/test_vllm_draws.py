"""The real vLLM draws each turn, rollout, attempt and piece anew, through the gateway. Over updates of its
weights, each token is of the weights that the gateway says."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from conversing import TOKENIZER, build_model, converse
from repeats import Repeats, repeats_beyond_chance
from scripted_engine import gateway
from updated_policy import check, repeats_of_pieces, sample_over_updates, versions_of
from vllm_cpu import vllm_here

from gymexp.config.schema import EngineConfig, ModelConfig
from gymexp.engine import vllm
from gymexp.engine.replicas import Replicas
from gymexp.processes import ports
from gymexp.processes.access_keys import ENGINE, header

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
NUM = 48


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def served(model, tmp_path_factory) -> Iterator[str]:
    """A vLLM with the model of test_draws, as a run starts it."""
    python = vllm_here()
    directory: Path = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    # NUM prompts at once are more than a batch takes: with chunked prefill, a vLLM on a CPU ends (0.31).
    engine = EngineConfig(python=str(python), args={"enforce_eager": True, "max_num_batched_tokens": 512})
    config = ModelConfig("m", str(directory), dtype="float32", max_model_len=512)
    with ports.listen() as free:
        port = free.getsockname()[1]
    command = vllm.serve_command(config, engine, port, vllm.read_version(engine), "disk")
    patched = pytest.MonkeyPatch()
    patched.setenv(ENGINE, "the engine's")
    environment = os.environ | vllm.environment("disk")
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        Replicas([url]).wait_healthy(300, threading.Event())
        yield url
        assert process.poll() is None, f"vLLM has ended:\n{(directory / 'log').read_text()[-8000:]}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)
        patched.undo()


def sample(url: str, seeds: list[int]) -> list[list[dict]]:
    async def run() -> list[list[dict]]:
        async with gateway(url, max_model_len=512) as http:
            return await asyncio.gather(*(converse(http, 0, seed, f"{i}") for i, seed in enumerate(seeds)))

    return asyncio.run(run())


def turns_of(model, rollouts: list[list[dict]]) -> Repeats:
    pairs = [pair for rollout in rollouts for pair in pairwise(rollout)]
    return sum(
        (repeats_beyond_chance(model, after, before["generation_token_ids"]) for before, after in pairs),
        Repeats(),
    )


def test_turns_and_members_of_a_group_are_drawn_independently(model, served):
    rollouts = sample(served, list(range(NUM)))
    members = Repeats()
    for before, after in pairwise(rollouts):
        members += repeats_beyond_chance(model, after[0], before[0]["generation_token_ids"])
    for repeats in (turns_of(model, rollouts), members):
        assert repeats.positions > 100 and repeats.variance > 5
        assert abs(repeats.z) < 4, repeats


def test_a_seed_that_turns_share_would_show(model, served, monkeypatch):
    monkeypatch.setattr("gymexp.rollout.draws.call_seed", lambda seed, *_: seed)
    shared = turns_of(model, sample(served, list(range(NUM))))
    assert shared.z > 10, shared


def test_the_same_seed_draws_the_same_tokens(served):
    ids = [[message["generation_token_ids"] for message in rollout] for rollout in sample(served, [5, 5, 6])]
    assert ids[0] == ids[1] != ids[2]


def count_tokens(url: str) -> int:
    request = urllib.request.Request(f"{url}/metrics", headers=header("the engine's"))
    with urllib.request.urlopen(request, timeout=30) as response:
        found = re.findall(r"^vllm:generation_tokens_total.* (\S+)$", response.read().decode(), re.MULTILINE)
    return int(sum(map(float, found)))


def test_over_updates_each_token_is_of_the_weights_that_the_gateway_says(model, served, tmp_path):
    models = versions_of(model, 3)
    turns = sample_over_updates(served, models, tmp_path, lambda: count_tokens(served), 440, on_cpu=True)
    check(models, turns, 1e-3)
    repeats = repeats_of_pieces(models, turns)
    assert repeats.variance > 5 and abs(repeats.z) < 4, repeats


def test_a_seed_that_pieces_share_would_show(model, served, tmp_path, monkeypatch):
    monkeypatch.setattr("gymexp.gateway.pieces.piece_seed", lambda seed, num_done: seed)
    models = versions_of(model, 3)
    turns = sample_over_updates(served, models, tmp_path, lambda: count_tokens(served), 440, on_cpu=True)
    assert repeats_of_pieces(models, turns).z > 10
