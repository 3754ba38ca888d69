"""The policy spread over two ranks trains as a whole one does. FSDP2 and DeepSpeed are real, on CPUs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded_ranks import ZERO_3, train, with_deepspeed
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_run import TINY

from gymexp.cluster.placement import Placement, Share
from gymexp.config.load import to_yaml
from gymexp.config.schema import DataConfig, EnvConfig, LoraConfig, ModelConfig, RunConfig
from gymexp.errors import ConfigError
from gymexp.policy.checkpoint_model import materialize, write_adapter
from gymexp.training import sharding


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> dict:
    """An adapter of a model whose head is not its embedding, and is sharded by itself."""
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.01)
    path = tmp_path_factory.mktemp("untied")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(path)
    return {"lora": 4, "path": str(path)}


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Callable[[dict], Path]:
    """What two ranks that each hold everything come to."""
    made: dict[bool, Path] = {}

    def make(more: dict) -> Path:
        if (key := "lora" in more) not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            train(made[key], 2, {}, **more)
        return made[key]

    return make


def differ(one: Path, other: Path) -> float:
    """The largest difference of a weight; both have the same names and shapes."""
    ours, theirs = load_file(one), load_file(other)
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def lag(one: Path, other: Path, name: str = "sent-2.safetensors") -> float:
    """How far the weights of two runs are from each other, as a share of how far they have moved. The largest
    difference of a single weight says less: AdamW moves one by the whole learning rate also where rounding
    alone decides on the sign of its gradient."""
    ours, theirs = load_file(one / name), load_file(other / name)
    start = load_file(other / "sent-0.safetensors")
    moved = sum((theirs[n] - start[n]).double().square().sum() for n in start)
    return float((sum((ours[n] - theirs[n]).double().square().sum() for n in start) / moved).sqrt())


@pytest.mark.ranks
@pytest.mark.parametrize("lora", [False, True], ids=["all", "adapter"])
@pytest.mark.parametrize(
    "trainer", [{"fsdp": True}, pytest.param(ZERO_3, marks=with_deepspeed)], ids=["fsdp", "zero3"]
)
def test_shards_train_go_on_from_a_checkpoint_and_end_as_a_whole_policy_does(
    tmp_path, whole, adapter, trainer, lora
):
    more = adapter if lora else {}
    expected = whole(more)
    if not lora:
        train(tmp_path, 1, trainer, **more)
        checkpoint = tmp_path / "checkpoints" / "checkpoint-1"
        assert not (checkpoint / "model.safetensors").exists(), "the shards are enough"
        sealed = json.loads((checkpoint / "complete.json").read_text())
        assert any("0" in name and "model" in name for name in sealed)
        assert any("optim" in name for name in sealed)
    train(tmp_path, 2, trainer, **more)
    left = [p.name for p in (tmp_path / "checkpoints").glob("checkpoint-*")]
    assert left == ["checkpoint-2"], "keep_last=1"
    assert differ(tmp_path / "sent-0.safetensors", expected / "sent-0.safetensors") == 0
    assert differ(tmp_path / "sent-0.safetensors", tmp_path / "sent-2.safetensors") > 1e-3
    for name in ("sent-2.safetensors", "model/model.safetensors"):
        assert differ(tmp_path / name, expected / name) < 1e-4
    if lora:
        name = "adapter/adapter_model.safetensors"
        assert differ(tmp_path / name, expected / name) < 1e-4
        assert differ(tmp_path / name, tmp_path / "sent_adapter.safetensors") == 0
    becomes_the_final_model(tmp_path, lora=4 if lora else None, path=more.get("path", str(TINY)))
    said = json.loads((tmp_path / "model" / "config.json").read_text())
    assert said == json.loads((expected / "model" / "config.json").read_text())


@pytest.mark.ranks
@pytest.mark.parametrize(
    "trainer",
    [{}, {"fsdp": True}, pytest.param(ZERO_3, marks=with_deepspeed)],
    ids=["whole", "fsdp", "zero3"],
)
def test_packed_rows_train_as_padded_ones_do_on_several_ranks(tmp_path, whole, trainer):
    train(tmp_path, 2, trainer, packing="tree")
    assert lag(tmp_path, whole({})) < 1e-3


@pytest.mark.ranks
@pytest.mark.parametrize("trainer", [{"ddp_bucket_cap_mb": 1}, {"fsdp": True}], ids=["whole", "fsdp"])
def test_compiled_layers_train_as_others_do_on_several_ranks_under_the_same_names(tmp_path, whole, trainer):
    """The whole model is larger than a bucket."""
    compiles = {"torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_checkpointing": True}
    train(tmp_path, 2, trainer | compiles, packing="tree")
    for name in ("sent-2.safetensors", "model/model.safetensors"):
        assert lag(tmp_path, whole({}), name) < 1e-3
    if trainer.get("fsdp"):
        becomes_the_final_model(tmp_path, lora=None, path=str(TINY))
    else:
        saved = tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors"
        assert differ(saved, tmp_path / "model" / "model.safetensors") == 0


@pytest.mark.ranks
@pytest.mark.parametrize(
    "trainer",
    [{"ddp_bucket_cap_mb": 1}, {"fsdp": True}, pytest.param(ZERO_3, marks=with_deepspeed)],
    ids=["whole", "fsdp", "zero3"],
)
def test_ranks_may_differ_in_the_layers_that_they_compute_again(tmp_path, whole, trainer):
    """One has memory for all layers, the other for none."""
    checkpoints = {"gradient_checkpointing": True}
    train(tmp_path, 2, trainer | checkpoints, enough_memory=[True, False])
    assert differ(tmp_path / "sent-2.safetensors", whole({}) / "sent-2.safetensors") < 1e-4
    again = [json.loads((tmp_path / f"checked-{rank}-2.json").read_text())["layers_again"] for rank in (0, 1)]
    assert again[0][1:] == [0.0] * 3 and again[1][1:] == [1.0] * 3


def becomes_the_final_model(run: Path, lora: int | None, path: str, dtype: str = "float32") -> None:
    """The shards of the last checkpoint make the very files that the ranks wrote together at the end."""
    data = DataConfig("jsonl", train_file="t", validation_file="v")
    model = ModelConfig("tiny", path, dtype=dtype, lora=LoraConfig(lora))
    (run / "config.yaml").write_text(
        to_yaml(RunConfig("r", model=model, env={"e": EnvConfig("c", "a", data=data)}))
    )
    made = materialize(run, run / "checkpoints" / "checkpoint-2", run / "made")
    final = {p.name: p.read_bytes() for p in (run / "model").iterdir()}
    assert made == run / "made" and {p.name: p.read_bytes() for p in made.iterdir()} == final
    if lora:
        write_adapter(run, run / "checkpoints" / "checkpoint-2", run / "apart")
        name = "adapter_model.safetensors"
        assert differ(run / "apart" / name, run / "adapter" / name) == 0


@pytest.mark.ranks
@with_deepspeed
@pytest.mark.parametrize("lora", [None, 4], ids=["all", "adapter"])
@pytest.mark.parametrize("stage", [2, 3])
def test_what_deepspeed_holds_in_16_bits_becomes_a_plain_model_too(tmp_path, stage, lora):
    """Its optimizer alone has the weights in float32."""
    trainer = {"deepspeed": {"zero_optimization": {"stage": stage}}}
    train(tmp_path, 2, trainer, dtype="bfloat16", lora=lora)
    becomes_the_final_model(tmp_path, lora, str(TINY), dtype="bfloat16")


@pytest.mark.ranks
def test_log_probabilities_of_a_bfloat16_policy_in_shards_are_not_rounded_to_it(tmp_path):
    train(tmp_path, 1, {"fsdp": True, "max_steps": 1}, dtype="bfloat16")
    logprobs = torch.tensor(json.loads((tmp_path / "logprobs.json").read_text()))
    assert (logprobs != logprobs.bfloat16().float()).float().mean() > 0.5


def placed(engine: str, num_gpus: int) -> Placement:
    return Placement(engine, [Share(0, [str(i) for i in range(num_gpus)])], [])


def configured(**trainer) -> RunConfig:
    return RunConfig(env={"e": EnvConfig("c", "a")}, trainer=trainer)


def test_a_seed_leaves_room_for_every_ranks_own():
    """transformers seeds numpy, which takes 32 bits, with the run's seed and the rank's number."""
    sharding.check(dataclasses.replace(configured(), seed=2**32 - 2), placed("vllm", 2))
    with pytest.raises(ConfigError, match=r"seed must be at most 2\*\*32 - 2 with 2 training processes"):
        sharding.check(dataclasses.replace(configured(), seed=2**32 - 1), placed("vllm", 2))


def test_a_backend_between_ranks_is_for_several_of_them():
    """transformers would fail on it where a single process trains."""
    with pytest.raises(ConfigError, match=r"trainer\.ddp_backend must be left out .* got 'gloo'"):
        sharding.check(configured(ddp_backend="gloo"), placed("vllm", 1))
    sharding.check(configured(ddp_backend="gloo"), placed("vllm", 2))


@pytest.mark.parametrize(
    ("engine", "num_gpus", "said"),
    [
        ("hf", 1, r"trainer\.fsdp shards .* engine=hf samples .* say engine=vllm"),
        (
            "vllm",
            1,
            r"trainer\.fsdp must be left out where fewer than two GPUs .* \(1 here\), got True",
        ),
        ("vllm", 0, r"fewer than two GPUs or nodes train \(1 here\)"),
    ],
)
def test_what_cannot_be_sharded_is_said_before_anything_starts(engine, num_gpus, said):
    with pytest.raises(ConfigError, match=said):
        sharding.check(configured(fsdp=True), placed(engine, num_gpus))
    sharding.check(configured(fsdp=True), placed("vllm", 2))
    sharding.check(configured(), placed(engine, num_gpus))


def test_a_stage_is_enough_of_deepspeeds_configuration_and_what_is_given_stays():
    config = sharding.complete({"deepspeed": {"zero_optimization": {"stage": 2}}, "beta": 0})["deepspeed"]
    assert config["zero_optimization"] == {"stage": 2} | dict.fromkeys(sharding._AUTO_ZERO, "auto")
    assert config["bf16"] == {"enabled": "auto"} and config["train_batch_size"] == "auto"
    given = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5}, "gradient_clipping": 2.0}
    config = sharding.complete({"deepspeed": given})["deepspeed"]
    assert config["zero_optimization"]["reduce_bucket_size"] == 5 and config["gradient_clipping"] == 2.0
    assert sharding.complete({"deepspeed": "zero.json"}) == {"deepspeed": "zero.json"}


def test_fsdp_saves_shards_unless_told_otherwise():
    assert sharding.complete({"fsdp": True})["fsdp_config"] == {"state_dict_type": "SHARDED_STATE_DICT"}
    given = {"state_dict_type": "FULL_STATE_DICT", "reshard_after_forward": False}
    assert sharding.complete({"fsdp": True, "fsdp_config": given})["fsdp_config"] == given
    assert sharding.complete({"beta": 0}) == {"beta": 0}
