"""Loading a policy: what is wrong with `model.path` is said with the key, the value and a way on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from chat_tokenizers import build_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from whole_run import ROOT, TINY

from gymexp.config.schema import LoraConfig, ModelConfig
from gymexp.errors import ConfigError
from gymexp.policy.hub_snapshot import resolve_path
from gymexp.policy.model import end_token_ids, load_model, load_tokenizer


def config(path) -> ModelConfig:
    return ModelConfig(name="x", path=str(path))


def save_tokenizer(directory, **extra) -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    for key, value in extra.items():
        setattr(tokenizer, key, value)
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "qwen3"}')


@pytest.mark.parametrize("path", ["no/such/place", "./nowhere", "/nowhere"])
def test_a_directory_that_is_not_there_is_named(path):
    with pytest.raises(ConfigError, match=r"model\.path must be a directory that exists"):
        resolve_path(path)


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"with a config\.json"):
        resolve_path(str(tmp_path))


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2"])
def test_a_hub_id_stays_a_hub_id(name):
    assert resolve_path(name) == name


def test_a_place_that_was_looked_at_is_named_once(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        resolve_path("no/such/place")
    assert str(caught.value).count(str(ROOT / "no/such/place")) == 1


@pytest.mark.parametrize(
    ("settings", "savable"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, True),  # as some on the hub have it
        ({"do_sample": True, "temperature": 0.6}, True),
        ({"num_beams": 1, "early_stopping": True}, False),
    ],
)
def test_a_generation_config_that_transformers_does_not_save_is_mended_or_refused_when_it_is_loaded(
    tmp_path, settings, savable
):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    if savable:
        load_model(config(tmp_path / "model")).save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
        assert saved["temperature"] == 0.6 and saved["do_sample"] is True
    else:
        with pytest.raises(ConfigError, match=r"generation_config\.json must be one that transformers saves"):
            load_model(config(tmp_path / "model"))


def test_a_relative_directory_is_found_from_anywhere(tmp_path, monkeypatch):
    save_tokenizer(tmp_path / "here" if (tmp_path / "here").mkdir() is None else tmp_path)
    monkeypatch.chdir(tmp_path)
    assert resolve_path("here") == str((tmp_path / "here").resolve())


def test_a_hub_that_cannot_be_reached_is_a_config_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"model\.path=nobody/nothing-at-all.*HF_HUB_OFFLINE is set"):
        load_tokenizer(config("nobody/nothing-at-all"))


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    save_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="chat template"):
        load_tokenizer(config(tmp_path))


def test_a_missing_pad_token_is_filled_in(tmp_path):
    save_tokenizer(tmp_path, chat_template="{{ messages[0].content }}")
    assert load_tokenizer(config(tmp_path)).pad_token == "</s>"


def test_end_tokens_come_from_tokenizer_and_generation_config(tmp_path):
    save_tokenizer(tmp_path, chat_template="{{ messages[0].content }}")
    tokenizer = load_tokenizer(config(tmp_path))
    assert end_token_ids(tokenizer, str(tmp_path)) == [1]
    for given in (0, [1, 0]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        assert end_token_ids(tokenizer, str(tmp_path)) == [0, 1]


def test_the_token_that_ends_a_turn_of_the_chat_template_is_an_end_token(tmp_path):
    tokenizer = build_tokenizer("qwen3")
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<think>"  # as base models have another than their template
    assert end_token_ids(tokenizer, str(tmp_path)) == sorted([end_of_turn, tokenizer.eos_token_id])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_small_step_moves_every_weight_that_is_trained_whatever_the_arithmetic(dtype):
    model = load_model(ModelConfig(name="tiny", path=str(TINY), dtype=dtype))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = [(new != old).float().mean() for new, old in zip(model.parameters(), before, strict=True)]
    assert min(moved) > 0.5, "all but those of an RMSNorm, near 1, where float32 is coarse too"


def test_weights_that_an_adapter_leaves_alone_take_no_more_room_than_the_arithmetic_needs():
    config = ModelConfig(name="tiny", path=str(TINY), dtype="bfloat16", lora=LoraConfig(r=4))
    assert load_model(config).dtype is torch.bfloat16
