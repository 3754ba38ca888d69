"""Which layers the backward pass computes again, though TRL switches this off and on at every step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_trainer import TINY, MadeUp, build_trainer, gradient_of
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig

from gymexp.config.schema import LoraConfig
from gymexp.training import recomputed_layers

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": NUM_LAYERS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes, **heads)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def passes_of_layers(policy: Path, directory: Path, **settings) -> tuple[list[int], torch.Tensor]:
    """How often each layer was computed for a gradient in two steps, and the first step's gradient."""
    trainer = build_trainer(policy, directory, MadeUp(), max_steps=2, **settings)
    counts = [0] * NUM_LAYERS
    layers = [module for module in trainer.model.modules() if type(module).__name__ == "Qwen3DecoderLayer"]
    assert len(layers) == NUM_LAYERS

    for index, layer in enumerate(layers):
        attention = layer.self_attn

        def count(*_: object, index: int = index) -> None:
            counts[index] += torch.is_grad_enabled()

        attention.register_forward_pre_hook(count)
    return counts, gradient_of(trainer)


@pytest.mark.parametrize("packing", ["none", "tree"])
@pytest.mark.parametrize("lora", [None, 4], ids=["all", "adapter"])
def test_every_second_layer_is_computed_again_at_every_step_with_the_same_gradient(
    policy, tmp_path, packing, lora
):
    settings = {"packing": packing, "lora": LoraConfig(r=lora, lora_dropout=0.0)}
    once, expected = passes_of_layers(policy, tmp_path, **settings)
    assert len({*once}) == 1 and once[0] > 0
    kwargs = {"every_n_layers": 2}
    counts, gradient = passes_of_layers(
        policy, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, **settings
    )
    assert counts == [2 * once[0], once[0], 2 * once[0], once[0]]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"every_n_layers": 1}])
def test_all_layers_are_computed_again_where_no_gpu_trains(policy, tmp_path, kwargs):
    once, expected = passes_of_layers(policy, tmp_path)
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    counts, gradient = passes_of_layers(policy, tmp_path, **settings)
    assert counts == [2 * number for number in once]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


def test_what_torch_gets_is_what_is_left_of_the_arguments():
    given = {"every_n_layers": 3, "use_reentrant": False, "offload": True}
    assert recomputed_layers.split(given) == (
        {"every_n_layers": 3, "offload": True},
        {"use_reentrant": False},
    )
    assert recomputed_layers.split(None) == ({"every_n_layers": "auto", "offload": False}, {})


def arguments_of(kwargs: dict, **settings):
    deepspeed = settings.pop("deepspeed", None)
    args = GRPOConfig(
        "unused", use_cpu=True, bf16=False, gradient_checkpointing_kwargs=kwargs, report_to=[], **settings
    )
    args.deepspeed = deepspeed  # which would be imported above
    return args


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        (
            {"every_n_layers": 0},
            r"trainer\.gradient_checkpointing_kwargs\.every_n_layers must be auto or an integer >= 1, got 0",
        ),
        ({"every_n_layers": 0.5}, r"every_n_layers must be auto or an integer >= 1, got 0\.5"),
        ({"every_n_layers": True}, r"every_n_layers must be auto or an integer >= 1, got True"),
        ({"every_n_layers": "none"}, r"every_n_layers must be auto or an integer >= 1, got 'none'"),
        ({"every_n_layers": "auto"}, r"must be an integer >= 1 where no GPU trains, got 'auto'"),
        ({"offload": "cpu"}, r"offload must be true or false, got 'cpu'"),
        ({"offload": True}, r"offload must be false where no GPU trains, got true"),
    ],
)
def test_an_option_without_a_valid_value_is_refused_before_anything_starts(kwargs, said):
    with pytest.raises(ValueError, match=said):
        recomputed_layers.check(arguments_of(kwargs), has_gpu=False)


# (arguments, whether the free memory decides on a GPU, what `every_n_layers: auto` is told there)
CHOICES = [
    ({}, True, ""),
    ({"offload": True}, False, "with offload=true"),
    ({"skip_memory_metrics": False}, False, "with trainer.skip_memory_metrics=false"),
    ({"fsdp": True}, True, ""),
    ({"deepspeed": {"zero_optimization": {"stage": 3}}}, False, "with trainer.deepspeed"),
]


@pytest.mark.parametrize(("settings", "is_by_memory", "said"), CHOICES)
def test_the_free_memory_decides_on_a_gpu_unless_it_cannot(settings, is_by_memory, said):
    settings = dict(settings)
    kwargs = {"offload": True} if settings.pop("offload", False) else {}
    args = arguments_of(kwargs, **settings)
    assert recomputed_layers.is_by_memory(args, has_gpu=True) == is_by_memory
    assert not recomputed_layers.is_by_memory(args, has_gpu=False)
    recomputed_layers.check(args, has_gpu=True)
    for every in (1, 3):
        recomputed_layers.check(arguments_of(kwargs | {"every_n_layers": every}, **settings), has_gpu=True)
    asked = arguments_of(kwargs | {"every_n_layers": "auto"}, **settings)
    if is_by_memory:
        recomputed_layers.check(asked, has_gpu=True)
        return
    with pytest.raises(ValueError, match=said):
        recomputed_layers.check(asked, has_gpu=True)


@pytest.mark.parametrize(
    "settings",
    [{"gradient_checkpointing": False}, {"gradient_checkpointing_kwargs": {"every_n_layers": 1}}],
)
def test_what_is_asked_for_is_not_left_to_the_memory(settings):
    args = GRPOConfig("unused", use_cpu=True, bf16=False, report_to=[], **settings)
    assert not recomputed_layers.is_by_memory(args, has_gpu=True)
