"""Exported folders sample what the run's policy samples: by transformers, by peft, and by `vllm serve`."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_run import write_run
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_run import TINY

from gymexp.config.schema import LoraConfig, ModelConfig
from gymexp.export.chosen import choose
from gymexp.export.folder import write_folder
from gymexp.policy.lora import build_peft_config
from gymexp.processes.ports import reserve
from gymexp.training import checkpoints

LORA = LoraConfig(r=4)
MESSAGES = [{"role": "user", "content": "Solve this sudoku: 1 _ 3 4"}]
TOKENS = 24


def prompt_ids(folder: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def greedy(model: Any) -> list[int]:
    """The model's most likely tokens, each by a whole forward pass."""
    ids = prompt_ids(TINY)
    for _ in range(TOKENS):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-TOKENS:]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def policy() -> Any:
    """The tiny model with an adapter that changes what it says."""
    torch.manual_seed(0)
    base = load(TINY)
    policy = get_peft_model(base, build_peft_config(LORA, base))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return policy.eval()


@pytest.fixture(scope="module")
def expected(policy) -> list[int]:
    tokens = greedy(policy)
    with policy.disable_adapter():
        assert tokens != greedy(policy), "the adapter must matter"
    return tokens


@pytest.fixture(scope="module")
def run(policy, tmp_path_factory) -> Path:
    """A run that goes on: its newest policy is the adapter in a checkpoint."""
    model = ModelConfig("tiny", str(TINY), dtype="float32", lora=LORA)
    run = write_run(tmp_path_factory.mktemp("outputs") / "demo", model=model)
    (run / "result.json").unlink()
    checkpoint = run / "checkpoints" / "checkpoint-3"
    policy.save_pretrained(checkpoint)
    checkpoints.seal(checkpoint)
    return run


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("merged") / "policy"
    write_folder(choose(run, "last"), to, adapter=False, name=None)
    return to


def test_transformers_says_what_the_policy_says(merged, expected):
    assert greedy(load(merged)) == expected
    assert prompt_ids(merged) == prompt_ids(TINY)


def test_peft_puts_the_exported_adapter_on_its_base(run, tmp_path, expected):
    write_folder(choose(run, "last"), tmp_path / "policy", adapter=True, name=None)
    assert greedy(PeftModel.from_pretrained(load(TINY), tmp_path / "policy").eval()) == expected
    assert prompt_ids(tmp_path / "policy") == prompt_ids(TINY)


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_vllm_serves_the_folder_and_says_what_the_policy_says(merged, expected, vllm, vllm_python, tmp_path):
    with reserve(exclusive=False) as held:  # closed again: `vllm serve` binds alone
        port = held.getsockname()[1]
    command = [vllm_python.parent / "vllm", "serve", merged, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    with (tmp_path / "vllm.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(f"{url}/health", server, tmp_path / "vllm.log")
        body = {"model": str(merged), "prompt": prompt_ids(merged), "max_tokens": TOKENS, "temperature": 0}
        body |= {"return_token_ids": True, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        [choice] = json.loads(urllib.request.urlopen(request, timeout=120).read())["choices"]
    finally:
        os.killpg(server.pid, 15)
        server.wait(60)
    assert choice["token_ids"] == expected


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 400
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
