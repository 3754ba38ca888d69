"""What a run's model must be able to say is known before anything of the run starts."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
from chat_tokenizers import MISTRAL_LIKE
from hub_stand_in import put_into_cache
from whole_run import TINY

from gymexp.config.schema import DataConfig, EnvConfig, ModelConfig, RunConfig
from gymexp.data import prepare
from gymexp.data.prepare import Prepared
from gymexp.errors import ConfigError
from gymexp.gateway import prompt_lengths, tokenizer_check
from gymexp.gym import definitions, install
from gymexp.rollout.outcome import Task
from gymexp.run import controller
from gymexp.run.train import train
from gymexp.training import arguments

TOOL = {"type": "function", "name": "look_up", "parameters": {"type": "object", "properties": {}}}


def prepared(*tools: dict, **parameters) -> Prepared:
    row = {"responses_create_params": {"input": "x", "tools": list(tools), **parameters}}
    tasks = [Task(f"office/train/{number}", "office", "x", row) for number in range(64)]
    return Prepared(tasks, {"office": tasks[:1]}, {})


@pytest.fixture
def mistral_like(tmp_path) -> Path:
    """The tiny policy, whose chat template writes tool calls in a form of its own."""
    return copy_of_tiny(tmp_path / "mistral_like", MISTRAL_LIKE)


def copy_of_tiny(directory: Path, template: str | None, **changes) -> Path:
    shutil.copytree(TINY, directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    del config["response_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config | changes))
    (directory / "chat_template.jinja").unlink()
    if template:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def check(directory: Path, cache: Path, tasks: Prepared) -> None:
    tokenizer_check.check(ModelConfig("tiny", str(directory)), tasks, cache)


def test_tools_whose_calls_nothing_reads_are_refused_and_without_tools_the_model_serves(
    mistral_like, tmp_path, monkeypatch
):
    with pytest.raises(ConfigError) as caught:
        check(mistral_like, tmp_path, prepared(TOOL))
    text = str(caught.value)
    assert "the tasks of office have tools" in text and "env=[" in text
    assert f"{mistral_like}/tokenizer_config.json, as response_template" in text
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was looked at already"))
    check(mistral_like, tmp_path, prepared())
    check(mistral_like, tmp_path, prepared(TOOL, tool_choice="none"))


def test_a_response_template_of_the_users_own_makes_the_same_model_serve(tmp_path):
    calls = {"open": "[TOOL_CALLS]", "close": "<|im_end|>", "content": "json", "repeats": True}
    fields = {"content": {"content": "text"}, "tool_calls": calls}
    own = {"start_anchor": "[/INST]", "fields": fields}
    check(copy_of_tiny(tmp_path / "m", MISTRAL_LIKE, response_template=own), tmp_path, prepared(TOOL))


def test_of_a_models_chat_templates_the_one_that_transformers_takes_for_tools_counts(tmp_path):
    readable = (TINY / "chat_template.jinja").read_text()
    for name, template, other in (("a", MISTRAL_LIKE, readable), ("b", readable, MISTRAL_LIKE)):
        directory = copy_of_tiny(tmp_path / name, template)
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text(other)
    check(tmp_path / "a", tmp_path, prepared(TOOL))
    with pytest.raises(ConfigError, match="gymexp cannot read"):
        check(tmp_path / "b", tmp_path, prepared(TOOL))


@pytest.mark.parametrize(
    ("template", "changes", "reason"),
    [
        (None, {}, "whose tokenizer has a chat template"),
        (None, {"chat_template": [{"name": "rag", "template": "x"}]}, "one must be named default.*has rag"),
        (MISTRAL_LIKE, {"response_template": {"fields": {}}}, "response_template in .* must be one of"),
    ],
)
def test_a_tokenizer_that_does_not_serve_is_refused_also_without_tools(tmp_path, template, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        check(copy_of_tiny(tmp_path / "m", template, **changes), tmp_path, prepared())


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """`train` as far as the controller; the directory that it would run in."""
    monkeypatch.setenv("GYMEXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arguments, "check", lambda *_: None)
    monkeypatch.setattr(prompt_lengths, "check", lambda *_: None)
    monkeypatch.setattr(definitions, "ensure_environments", lambda *_: tmp_path)
    monkeypatch.setattr(install, "site_packages", lambda *_: tmp_path)
    monkeypatch.setattr(controller, "run", lambda *_: {"held_out": {}})

    def run(model: ModelConfig, tasks: Prepared) -> Path:
        monkeypatch.setattr(prepare, "prepare", lambda *_: tasks)
        monkeypatch.setattr(prepare, "write_prepared", lambda *_: None)
        env = {"office": EnvConfig("c", "x", data=DataConfig(source="generate"))}
        trainer = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1}
        train(RunConfig(name="x", model=model, env=env, trainer=trainer), [], tmp_path / "run")
        return tmp_path / "run"

    return run


def test_a_run_is_refused_before_its_directory_is_taken(begin, mistral_like, tmp_path):
    with pytest.raises(ConfigError, match="gymexp cannot read the tool calls"):
        begin(ModelConfig("tiny", str(mistral_like)), prepared(TOOL))
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_the_commit_that_it_began_with(begin, tmp_path, monkeypatch):
    cache, commit = tmp_path / "hf", 40 * "b"
    put_into_cache(cache, "acme/tiny", "v2", commit, {p.name: p.read_bytes() for p in TINY.iterdir()})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    run = begin(ModelConfig("tiny", "acme/tiny", "v2"), prepared(TOOL))
    assert f"revision: {commit}" in (run / "config.yaml").read_text()
