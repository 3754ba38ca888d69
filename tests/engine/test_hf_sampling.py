"""The hf engine's sampling distribution against one that is computed token by token in plain Python."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from gymexp.engine.hf.engine import HFEngine
from gymexp.engine.hf.sampling import SamplingParams, sample_tokens
from gymexp.engine.hf.server import build_params

SETTINGS = [
    SamplingParams(min_p=0.3),
    SamplingParams(temperature=2.0, min_p=0.5),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(repetition_penalty=0.6, temperature=0.7),
    SamplingParams(min_p=0.2, top_k=3, top_p=0.8, repetition_penalty=1.3, temperature=1.5),
    SamplingParams(min_p=1.0),
    SamplingParams(),
]


def distribution(logits: list[float], history: set[int], params: SamplingParams) -> dict[int, float]:
    """Token -> probability as vLLM's documentation of SamplingParams describes it, and in vLLM's order:
    penalty, temperature, min_p, top_k, top_p."""
    scores = dict(enumerate(logits))
    for token in history:
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    probs = normalised({token: math.exp(score / params.temperature) for token, score in scores.items()})
    least = params.min_p * max(probs.values())
    likely = sorted((token for token in probs if probs[token] >= least), key=lambda token: -probs[token])
    if params.top_k:
        likely = likely[: params.top_k]
    left = normalised({token: probs[token] for token in likely})
    nucleus, mass = {}, 0.0
    for token in likely:
        if mass >= params.top_p and nucleus:
            break
        nucleus[token] = left[token]
        mass += left[token]
    return normalised(nucleus)


def normalised(weights: dict[int, float]) -> dict[int, float]:
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_tokens_and_log_probabilities_are_those_of_the_asked_distribution(params):
    draw = random.Random(7)
    logits = [draw.gauss(0, 1.5) for _ in range(12)]
    history = [3, 5, 5, 8]
    expected = distribution(logits, set(history), params)
    num = 2000
    rows = torch.tensor([logits]).expand(num, -1)
    uniforms = [(i + 0.5) / num for i in range(num)]
    tokens, logprobs = sample_tokens(rows, [params] * num, uniforms, [history] * num)
    assert set(tokens) == set(expected)
    for token, logprob in zip(tokens, logprobs, strict=True):
        assert logprob == pytest.approx(math.log(expected[token]), abs=1e-4)
    for token, count in Counter(tokens).items():
        assert abs(count / num - expected[token]) <= 1 / num + 1e-6, "an even grid of uniforms"


def test_a_rows_settings_and_history_do_not_touch_its_neighbours():
    logits = torch.tensor([[2.0, 1.0, -1.0]] * 3)
    params = [SamplingParams(), SamplingParams(repetition_penalty=1.5), SamplingParams(min_p=0.9)]
    before = logits.clone()
    _, logprobs = sample_tokens(logits, params, [0.0] * 3, [[0], [0, 2], [0]])
    assert torch.equal(logits, before)
    for row, history in enumerate([[0], [0, 2], [0]]):
        [expected] = [distribution([2.0, 1.0, -1.0], set(history), params[row])]
        assert logprobs[row] == pytest.approx(math.log(expected[0]), abs=1e-6)


def test_greedy_sampling_takes_the_likeliest_after_the_penalty_and_cuts_nothing():
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    params = SamplingParams(temperature=0, repetition_penalty=2.0, min_p=0.9, top_k=1)
    [token], [logprob] = sample_tokens(logits, [params], [0.999], [[0]])
    expected = distribution([2.0, 1.9, -1.0], {0}, SamplingParams(repetition_penalty=2.0))
    assert token == 1 and logprob == pytest.approx(math.log(expected[1]), abs=1e-6)


def test_the_engine_penalises_what_stands_in_the_prompt_and_what_it_has_generated():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=30, initializer_range=0.4, **shape, **heads)).eval()
    engine = HFEngine(model, eos_token_ids=[], pad_token_id=0, max_model_len=64)
    try:
        prompt = [4, 9, 9, 2]
        params = SamplingParams(temperature=0.8, repetition_penalty=1.8, min_p=0.05, max_tokens=16, seed=3)
        generation = engine.submit(prompt, params).result(60)
    finally:
        engine.close()
    ids = list(prompt)
    for token, logprob in zip(generation.token_ids, generation.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].tolist()
        expected = distribution(logits, set(ids), params)
        assert logprob == pytest.approx(math.log(expected[token]), abs=1e-3)
        ids.append(token)


def test_the_servers_take_what_vllm_takes_and_refuse_what_it_refuses():
    given = {"min_p": 0.1, "repetition_penalty": 1.2, "top_k": 5, "temperature": 0.5}
    assert build_params(given) == SamplingParams(temperature=0.5, top_k=5, min_p=0.1, repetition_penalty=1.2)
    for key, value in [("min_p", 1.1), ("min_p", -0.1), ("repetition_penalty", 0), ("top_k", -2)]:
        with pytest.raises(ValueError, match=key):
            build_params({key: value})
