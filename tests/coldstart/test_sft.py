"""The cold start with the real TRL."""

from __future__ import annotations

import json
import random

import pytest
from hydra import compose, initialize_config_dir

from gymexp.coldstart import sft as coldstart
from gymexp.coldstart.sft import IGNORED, SFTOptions, tokenize, train
from gymexp.coldstart.tiny import Shape, build_model, build_tokenizer, render
from gymexp.config.explain import explain_key
from gymexp.config.group_options import CONF_DIR
from gymexp.config.schema import ModelConfig
from gymexp.errors import ConfigError, DataError
from gymexp.policy.model import load_model, load_tokenizer


def demonstrations(n: int) -> list[dict]:
    rng = random.Random(0)
    words = ["sun", "moon", "star", "rain", "wind"]
    made = []
    for _ in range(n):
        word = rng.choice(words)
        said = [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}]
        made.append({"messages": said, "tools": None})
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([render(d["messages"], d["tools"]) for d in demonstrations(50)], vocab_size=320)


def load(*overrides: str) -> coldstart.ColdstartConfig:
    coldstart.register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return coldstart.load(compose("coldstart", list(overrides)))


def test_only_the_assistants_words_are_labels(tokenizer):
    (example,) = tokenize(demonstrations(1), tokenizer, 100)
    word = demonstrations(1)[0]["messages"][1]["content"]
    assert tokenizer.decode([i for i in example["labels"] if i != IGNORED]) == f"{word}<|im_end|>"
    assert all(
        label in (IGNORED, i) for label, i in zip(example["labels"], example["input_ids"], strict=True)
    )


def test_demonstrations_that_are_too_long_are_left_out_and_none_left_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"sft\.max_length=5"):
        tokenize(demonstrations(3), tokenizer, 5)


def test_a_few_steps_lower_the_loss_and_the_policy_can_be_loaded(tokenizer, tmp_path):
    model = build_model(tokenizer, shape=Shape(hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    examples = tokenize(demonstrations(64), tokenizer, 100)
    options = SFTOptions(
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        warmup_steps=2,
        logging_steps=5,
        save_steps=10,
    )
    log = train(model, tokenizer, examples, options, tmp_path / "policy")
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    config = ModelConfig(name="x", path=str(tmp_path / "policy"), dtype="float32")
    again = load_model(config)
    assert again.config.use_cache
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["dtype"] == "float16"
    assert again.num_parameters() == model.num_parameters()
    assert load_tokenizer(config).chat_template == tokenizer.chat_template
    # Every so many steps, and nothing of TRL's own left behind.
    assert {p.name for p in tmp_path.iterdir()} == {"policy", "policy-step10", "policy-step20"}


def test_the_configuration_composes_and_its_mistakes_are_named():
    config = load("output=o", "env=[sudoku,workplace]", "env.workplace.weight=3", "sft.max_steps=7")
    assert set(config.env) == {"sudoku", "workplace"}
    assert (config.sft.max_steps, config.env["workplace"].weight, config.model.name) == (7, 3, "tiny")
    with pytest.raises(ConfigError, match=r"sft\.max_steps must be >= 1, got 0"):
        load("output=o", "sft.max_steps=0")
    with pytest.raises(ConfigError, match=r"model\.lora\.r must be null, got 4"):
        load("output=o", "model.lora.r=4")
    with pytest.raises(ConfigError, match=r"shape\.\* needs from_scratch=true"):
        load("output=o", "shape.hidden_size=64")
    with pytest.raises(ConfigError, match=r"shape\.head_dim must be >= 1, got 0"):
        load("output=o", "from_scratch=true", "shape.head_dim=0")
    with pytest.raises(ConfigError, match="output"):
        load()
    with pytest.raises(ConfigError, match=r"env\.sudoku\.weight"):
        load("output=o", "env.sudoku.weight=-1")
    said = explain_key("sft.max_step", coldstart.ColdstartConfig) or ""
    assert "did you mean sft.max_steps?" in said, "of its own keys, not a run's"
