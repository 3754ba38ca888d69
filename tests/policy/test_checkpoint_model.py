"""Checkpoints become plain models; what real trainers write is tested beside them (tests/training)."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_run import TINY

from gymexp.config.load import to_yaml
from gymexp.config.schema import DataConfig, EnvConfig, LoraConfig, ModelConfig, RunConfig
from gymexp.errors import ConfigError, GymexpError, RunDirectoryError
from gymexp.policy.checkpoint_model import materialize, write_adapter


def run_of(directory: Path, dtype: str = "bfloat16", lora: LoraConfig | None = None) -> Path:
    """A run's directory without checkpoints."""
    data = DataConfig("jsonl", train_file="t", validation_file="v")
    model = ModelConfig("tiny", str(TINY), dtype=dtype, lora=lora or LoraConfig())
    config = RunConfig("r", model=model, env={"e": EnvConfig("c", "a", data=data)})
    (directory / "config.yaml").write_text(to_yaml(config))
    return directory


def trained() -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    return model


def whole_checkpoint(run: Path) -> Path:
    checkpoint = run / "checkpoints" / "checkpoint-3"
    trained().save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(checkpoint)
    return checkpoint


def sharded_checkpoint(run: Path, state: dict) -> Path:
    """As accelerate writes FSDP's shards, by one rank."""
    checkpoint = run / "checkpoints" / "checkpoint-3"
    with warnings.catch_warnings(action="ignore"):
        dcp.save({"model": state}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0", no_dist=True)
    return checkpoint


def test_float32_weights_become_the_models_dtype_and_load(tmp_path):
    run = run_of(tmp_path)
    made = materialize(run, whole_checkpoint(run), tmp_path / "made")
    expected, ours = trained(), AutoModelForCausalLM.from_pretrained(made)
    assert ours.dtype == torch.bfloat16 and ours.config.use_cache
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name).bfloat16())
    assert (
        AutoTokenizer.from_pretrained(made).chat_template == AutoTokenizer.from_pretrained(TINY).chat_template
    )
    assert (made / "generation_config.json").exists()


def test_a_checkpoint_in_the_models_dtype_is_the_model_itself(tmp_path):
    run = run_of(tmp_path, "float32")
    checkpoint = whole_checkpoint(run)
    assert materialize(run, checkpoint, tmp_path / "made") == checkpoint
    assert not (tmp_path / "made").exists()


def test_shards_are_put_together(tmp_path):
    run = run_of(tmp_path)
    expected = trained()
    made = materialize(run, sharded_checkpoint(run, expected.state_dict()), tmp_path / "made")
    for name, tensor in load_file(made / "model.safetensors").items():
        assert torch.equal(tensor, expected.state_dict()[name].bfloat16())


def test_weights_gathered_into_one_file_are_read_as_well(tmp_path):
    """fsdp_config.state_dict_type=FULL_STATE_DICT."""
    run = run_of(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    torch.save(trained().state_dict(), checkpoint / "pytorch_model_fsdp.bin")
    made = materialize(run, checkpoint, tmp_path / "made")
    assert torch.equal(
        load_file(made / "model.safetensors")["model.norm.weight"],
        trained().state_dict()["model.norm.weight"].bfloat16(),
    )


@pytest.mark.parametrize("change", ["another name", "another shape", "one too few"])
def test_shards_of_another_model_are_refused_and_nothing_is_left(tmp_path, change):
    run = run_of(tmp_path)
    state = dict(trained().state_dict())
    norm = state.pop("model.norm.weight")
    state |= {"another name": {"norm": norm}, "another shape": {"model.norm.weight": norm[:7].clone()}}.get(
        change, {}
    )
    with pytest.raises(RunDirectoryError, match="they differ in "):
        materialize(run, sharded_checkpoint(run, state), tmp_path / "made")
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml", "checkpoints"}


def test_what_exists_is_not_written_over(tmp_path):
    run = run_of(tmp_path)
    checkpoint = whole_checkpoint(run)
    (tmp_path / "made").mkdir()
    with pytest.raises(RunDirectoryError, match="made must not exist"):
        materialize(run, checkpoint, tmp_path / "made")


def test_a_checkpoint_without_weights_is_named(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match=r"checkpoint-3 must have weights .* but it has none"):
        materialize(run_of(tmp_path), checkpoint, tmp_path / "made")


def test_deepspeeds_shards_without_deepspeed_are_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    (checkpoint / "global_step3").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r'pip install "gymexp\[deepspeed\]"'):
        materialize(run_of(tmp_path), checkpoint, tmp_path / "made")


def test_an_adapter_of_another_rank_is_refused(tmp_path):
    run = run_of(tmp_path, lora=LoraConfig(r=4))
    state = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 192)}
    with pytest.raises(RunDirectoryError, match=r"they differ in base_model.*lora_"):
        materialize(run, sharded_checkpoint(run, state), tmp_path / "made")


def test_a_run_without_an_adapter_has_none_to_write(tmp_path):
    run = run_of(tmp_path)
    with pytest.raises(GymexpError, match="has no adapter"):
        write_adapter(run, whole_checkpoint(run), tmp_path / "apart")


def test_a_base_model_that_is_gone_is_named(tmp_path):
    run = run_of(tmp_path)
    config = (run / "config.yaml").read_text().replace(str(TINY), str(tmp_path / "gone"))
    (run / "config.yaml").write_text(config)
    with pytest.raises(ConfigError, match="gone"):
        materialize(run, sharded_checkpoint(run, trained().state_dict()), tmp_path / "made")
    shutil.rmtree(tmp_path / "checkpoints")
    whole = whole_checkpoint(run)
    assert materialize(run, whole, tmp_path / "made").is_dir(), "a whole checkpoint needs no other model"
