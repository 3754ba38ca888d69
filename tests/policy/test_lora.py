"""The adapter with the real peft: what is merged and sent out, what is saved, and that the hf engine samples
with it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration
from whole_run import TINY

from gymexp.config.schema import LoraConfig
from gymexp.engine.hf.engine import HFEngine
from gymexp.engine.hf.sampling import SamplingParams
from gymexp.errors import ConfigError
from gymexp.policy.lora import (
    adapter_parameters,
    build_peft_config,
    merged_parameters,
    save_adapter,
    saved_name,
)
from gymexp.policy.model import save_policy


def base_model(dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """With biases and a head that is the embedding: what names of parameters may stumble over."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=100,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).to(dtype).eval()


def with_adapter(model, **settings) -> peft.PeftModel:
    """As TRL wraps it, and trained: a new adapter's second half is zero."""
    config = build_peft_config(LoraConfig(r=4, **settings), model)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


def bits(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_sent_out_and_saved_is_what_peft_merges_name_by_name_and_bit_by_bit(tmp_path, dtype):
    adapted = with_adapter(base_model(dtype))
    sent = dict(merged_parameters(adapted, nullcontext))
    policy: Any = adapted.merge_and_unload()
    assert same(sent, dict(policy.named_parameters()))
    save_policy(policy, sent, AutoTokenizer.from_pretrained(TINY), tmp_path)
    assert same(sent, load_file(tmp_path / "model.safetensors"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype
    assert sent.keys() == dict(base_model().named_parameters()).keys()
    assert all(tensor.dtype == dtype for tensor in sent.values())
    changed = {
        name for name, tensor in base_model(dtype).named_parameters() if not torch.equal(tensor, sent[name])
    }
    assert changed == {name for name in sent if "_proj.weight" in name}


@pytest.mark.parametrize(
    "settings", [{}, {"lora_alpha": 6, "target_modules": ["q_proj", "layers.1.mlp.up_proj"]}]
)
def test_what_is_sent_of_an_adapter_is_what_peft_saves_and_peft_reads_it_back(tmp_path, settings):
    adapted = with_adapter(base_model(), **settings)
    gathered: list[torch.nn.Parameter] = []

    def gather(parameters):
        gathered.extend(parameters)
        return nullcontext()

    sent = {saved_name(name): tensor for name, tensor in adapter_parameters(adapted, gather)}
    assert len(gathered) == len(sent) and all(p.requires_grad for p in gathered), "nothing frozen is gathered"
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "old").touch()
    save_adapter(tmp_path / "sent", iter(sent.items()), LoraConfig(r=4, **settings))
    assert not (tmp_path / "sent" / "old").exists()
    adapted.save_pretrained(tmp_path / "peft")
    name = "adapter_model.safetensors"
    assert same(load_file(tmp_path / "sent" / name), load_file(tmp_path / "peft" / name))
    ids = torch.arange(12)[None]
    if not settings:  # peft cannot tell from the last part of a name which of several layers has an adapter
        back = peft.PeftModel.from_pretrained(base_model(), str(tmp_path / "sent")).eval()
        assert torch.equal(back(ids).logits, adapted(ids).logits)
    assert not torch.equal(base_model()(ids).logits, adapted(ids).logits)
    read = peft.PeftConfig.from_pretrained(str(tmp_path / "sent"))
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path / "peft"))
    assert (read.r, read.lora_alpha, read.bias) == (theirs.r, theirs.lora_alpha, theirs.bias)


def test_what_is_sent_out_is_what_trl_would_send():
    adapted = with_adapter(base_model())
    theirs = VLLMGeneration.__new__(VLLMGeneration)
    theirs.model, theirs._dist = adapted, DistributedBackend(Accelerator(cpu=True))
    sent = dict(merged_parameters(adapted, nullcontext))
    assert same(sent, {name: tensor.clone() for name, tensor in theirs._iter_named_params()})


def test_sending_leaves_frozen_weights_as_they_are_where_merging_and_unmerging_rounds_them():
    adapted = with_adapter(base_model(torch.bfloat16))
    before = bits(adapted)
    for _ in merged_parameters(adapted, nullcontext):
        pass
    assert same(bits(adapted), before)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert not same(bits(adapted), before), "peft has become exact: TRL's own walk would do"


def test_a_saved_policy_is_loaded_by_transformers_alone_and_says_the_same(tmp_path):
    adapted = with_adapter(base_model())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        said = adapted(ids).logits
        without = base_model()(ids).logits
    merged = dict(merged_parameters(adapted, nullcontext))
    policy: Any = adapted.unload()
    save_policy(policy, merged, AutoTokenizer.from_pretrained(TINY), tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, said, atol=1e-5, rtol=1e-5)
    assert (said - without).abs().max() > 0.1, "the adapter says something"
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_an_engine_that_has_started_samples_with_an_adapter_put_in_later():
    model = base_model()
    without = copy.deepcopy(model)
    engine = HFEngine(model, eos_token_ids=[], pad_token_id=0)
    try:
        adapted = with_adapter(model, lora_dropout=0.5).train()
        prompt = list(range(10))
        generation = engine.submit(prompt, SamplingParams(max_tokens=12, seed=3)).result(60)
        assert adapted.training, "as the trainer left it"
    finally:
        engine.close()
    ids = torch.tensor([prompt + generation.token_ids])
    sampled = torch.tensor(generation.logprobs)
    for other, holds in ((adapted.eval(), True), (without, False)):
        with torch.no_grad():
            logits = other(ids).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(-1)[torch.arange(12), ids[0, len(prompt) :]]
        assert torch.allclose(own, sampled, atol=1e-5) is holds


@pytest.mark.parametrize(
    ("targets", "where"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "self_attn.v_proj"], {"q_proj", "v_proj"}),
        (r".*layers\.1\.mlp\..*_proj", {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_the_adapter_goes_where_it_is_told_to(targets, where):
    adapted = with_adapter(base_model(), target_modules=targets)
    found = {
        name.split(".lora_")[0].rsplit(".", 1)[-1]
        for name, _ in adapted.named_parameters()
        if "lora_" in name
    }
    assert found == where


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "qv_proj"], r"and 'qv_proj' is none; did you mean v_proj\?.*Known: down_proj, gate_proj"),
        (["lm_head"], "and 'lm_head' is none"),
        ("attention", "and 'attention' is none"),
        (".*(q_proj|lm_head)", "and 'lm_head' is none"),  # peft would take it, and TRL would not see it
        (r".*(q_proj|\.0\.mlp)", r"and 'model\.layers\.0\.mlp' is none"),  # peft would raise ValueError
    ],
)
def test_a_target_that_the_model_does_not_have_is_named(targets, said):
    with pytest.raises(ConfigError, match=rf"model\.lora\.target_modules must name linear layers.*{said}"):
        build_peft_config(LoraConfig(r=4, target_modules=targets), base_model())
