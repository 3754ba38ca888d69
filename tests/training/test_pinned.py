"""What a trainer holds of a pinned model: its reference is of the same commit, its adapter names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_stand_in import put_into_cache
from small_trainer import MadeUp, build_trainer, save_policy
from transformers import AutoModelForCausalLM

from gymexp.config.schema import LoraConfig, ModelConfig
from gymexp.policy.hub_snapshot import pin
from gymexp.policy.model import load_model

REPO = "acme/small"


@pytest.fixture
def pinned(tmp_path, monkeypatch) -> ModelConfig:
    """Version two of a model of which main has other weights; both in the cache, and no hub."""
    main = save_policy(tmp_path / "main")
    v2 = Path(shutil.copytree(main, tmp_path / "v2"))
    model = AutoModelForCausalLM.from_pretrained(main)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(v2)
    for ref, commit, directory in (("main", 40 * "a", main), ("v2", 40 * "b", v2)):
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        put_into_cache(tmp_path / "hf", REPO, ref, commit, files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return pin(ModelConfig("small", REPO, "v2", "float32"), print)


def test_the_reference_of_a_pinned_model_is_the_policy_that_the_run_begins_with(pinned, tmp_path):
    trainer = build_trainer(REPO, tmp_path, MadeUp(), beta=0.1, revision=pinned.revision)
    reference = dict(trainer.ref_model.named_parameters())
    assert all(torch.equal(p, reference[name]) for name, p in trainer.model.named_parameters())
    main = dict(load_model(pin(ModelConfig("small", REPO, None, "float32"), print)).named_parameters())
    assert not any(torch.equal(p, main[name]) for name, p in reference.items())
    trainer._first_step = 0
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0.0


def test_an_adapter_says_whose_it_is_and_not_where_this_machine_keeps_it(pinned, tmp_path):
    trainer = build_trainer(REPO, tmp_path, MadeUp(), revision=pinned.revision, lora=LoraConfig(r=2))
    trainer.save_policy(tmp_path / "run")
    said = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == (REPO, 40 * "b")
