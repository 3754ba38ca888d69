"""The hf engine as a server of its own: the weights that it is sent are those that it samples with."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest
import torch
from whole_run import ROOT, TINY

from gymexp.config.load import to_yaml
from gymexp.config.schema import EnvConfig, ModelConfig, RunConfig
from gymexp.engine.replicas import Replicas
from gymexp.engine.weight_transfer import DiskTransfer
from gymexp.errors import ServiceError
from gymexp.gateway.pieces import Pieces
from gymexp.policy.model import load_model
from gymexp.processes import ports
from gymexp.processes.access_keys import ENGINE, header
from gymexp.rollout.draws import piece_seed
from gymexp.rollout.generation import Generation

PROMPT = [3, 17, 40, 9, 250]
KEY = "the engine's"


@pytest.fixture(scope="module")
def replicas(tmp_path_factory) -> Iterator[Replicas]:
    """One, as a process of its own."""
    directory = tmp_path_factory.mktemp("replica")
    env = EnvConfig(config_path="x.yaml", agent="x")
    env.data.source, env.data.train_file, env.data.validation_file = "jsonl", "a", "b"
    config = RunConfig("test", model=ModelConfig("tiny", str(TINY), dtype="float32"), env={"x": env})
    (directory / "config.yaml").write_text(to_yaml(config))
    with ports.listen() as sock:
        command = [sys.executable, "-m", "gymexp.engine.hf.replica", str(directory / "config.yaml")]
        command += ["--fd", str(sock.fileno())]
        patched = pytest.MonkeyPatch()
        patched.setenv(ENGINE, KEY)
        process = subprocess.Popen(command, pass_fds=[sock.fileno()], cwd=ROOT)
        replicas = Replicas([ports.url_of(sock)])
        replicas.wait_healthy(120, threading.Event())
        yield replicas
        process.terminate()
        patched.undo()
        assert process.wait(20) == 0


def sample(replicas: Replicas) -> tuple[list[int], list[float]]:
    body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 12, "ignore_eos": True, "seed": 5}}
    url, data = f"{replicas.urls[0]}/inference/v1/generate", json.dumps(body).encode()
    request = urllib.request.Request(url, data, header(KEY))
    with urllib.request.urlopen(request, timeout=60) as response:
        choice = json.load(response)["choices"][0]
    return choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]]


def distance(model: torch.nn.Module, replicas: Replicas) -> float:
    """Between the log-probabilities that the replica says it sampled with, and the model's own."""
    ids, theirs = sample(replicas)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1]
    ours = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    return (ours - torch.tensor(theirs)).abs().max().item()


def test_it_samples_with_the_models_weights_then_with_those_that_it_is_sent(replicas, tmp_path):
    model = load_model(ModelConfig("tiny", str(TINY), dtype="float32")).eval()
    assert distance(model, replicas) < 1e-4
    transfer = DiskTransfer(tmp_path / "weights")
    for version in (1, 2, 3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1.05
        assert distance(model, replicas) > 1e-3, "not sent yet"
        replicas.post("/pause?mode=abort")
        transfer.send(replicas, version, [], iter(model.named_parameters()))
        replicas.post("/reset_prefix_cache")
        replicas.post("/resume")
        assert distance(model, replicas) < 1e-4
        assert replicas.get("/stats")[0]["weights_version"] == version


def test_what_is_sampled_waits_while_it_is_paused_however_often_that_is_said(replicas):
    replicas.post("/pause?mode=abort")
    replicas.post("/pause?mode=abort")
    done = threading.Event()
    threading.Thread(target=lambda: (sample(replicas), done.set()), daemon=True).start()
    assert not done.wait(1)
    replicas.post("/resume")
    assert done.wait(20)


def generate(replicas: Replicas, prompt: list[int], seed: int, max_tokens: int) -> dict:
    params = {"max_tokens": max_tokens, "ignore_eos": True, "seed": seed}
    url = f"{replicas.urls[0]}/inference/v1/generate"
    data = json.dumps({"token_ids": prompt, "sampling_params": params}).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, header(KEY)), timeout=60) as response:
        answer = json.load(response)
    return answer["choices"][0] | {"versions": answer["weights_versions"]}


def test_a_request_that_is_cut_has_what_its_seed_draws_and_goes_on_with_a_seed_of_its_own(
    replicas,
):
    whole = generate(replicas, PROMPT, 5, 300)
    answers: list[dict] = []
    asked = [
        threading.Thread(target=lambda: answers.append(generate(replicas, PROMPT, 5, 300))) for _ in range(3)
    ]
    for thread in asked:
        thread.start()
    deadline = time.monotonic() + 60
    while replicas.get("/stats")[0]["in_flight"] < 3:
        assert time.monotonic() < deadline
    replicas.post("/pause?mode=abort")
    for thread in asked:
        thread.join(20)
    assert len(answers) == 3 and replicas.get("/stats")[0]["in_flight"] == 0
    waiting = threading.Thread(target=lambda: answers.append(generate(replicas, PROMPT, 5, 3)))
    waiting.start()
    while replicas.get("/stats")[0]["waiting"] < 1:
        assert time.monotonic() < deadline
    replicas.post("/pause?mode=abort")
    waiting.join(20)
    replicas.post("/resume")
    assert [answer["finish_reason"] for answer in answers] == ["abort"] * 4
    assert answers[3]["token_ids"] == [], "it came while the engine was paused"
    for answer in answers[:3]:
        ids = answer["token_ids"]
        assert len(ids) < 300 and ids == whole["token_ids"][: len(ids)]
        assert sum(count for _, count in answer["versions"]) == len(ids)
    pieces = Pieces(PROMPT, {"max_tokens": 300, "seed": 5, "ignore_eos": True})
    first = answers[0]
    logprobs = [entry["logprob"] for entry in first["logprobs"]["content"]]
    pieces.add(Generation(first["token_ids"], logprobs, "abort", None))
    request = json.loads(pieces.payload())
    params = request["sampling_params"]
    rest = generate(replicas, request["token_ids"], params["seed"], params["max_tokens"])
    ids = first["token_ids"] + rest["token_ids"]
    assert len(ids) == 300
    again = generate(replicas, PROMPT + first["token_ids"], piece_seed(5, len(first["token_ids"])), 20)
    assert again["token_ids"] == rest["token_ids"][:20]


def test_only_a_pause_that_cuts_is_known(replicas):
    with pytest.raises(ServiceError, match=r"only mode of a pause is abort, got keep"):
        replicas.post("/pause?mode=keep")


def test_weights_of_another_model_are_refused_with_a_name(replicas, tmp_path):
    weights = {"model.embed_tokens.weight": torch.zeros(2, 2)}
    with pytest.raises(ServiceError, match=r"answered collective_rpc with 400: .* differ in model\.layers"):
        DiskTransfer(tmp_path).send(replicas, 1, [], iter(weights.items()))
    with pytest.raises(ServiceError, match=r"only method is reload_weights, got .*nothing"):
        replicas.post("/collective_rpc", {"method": "nothing"})
