"""The hf engine against transformers' own forward and generate, with tiny random models."""

import asyncio
import math
import socket
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError

import aiohttp
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gymexp.engine.hf.cache import check_supported, slot_attention
from gymexp.engine.hf.engine import HFEngine
from gymexp.engine.hf.sampling import SamplingParams, sample_tokens
from gymexp.engine.hf.server import build_params, serve
from gymexp.rollout.generation import EngineError, Generation

VOCAB = 200
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # large enough that attention and positions matter
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
}


def build_model(family: str = "qwen3") -> PreTrainedModel:
    torch.manual_seed(0)
    model_class, config_class, extra = FAMILIES[family]
    return model_class(config_class(**SHAPE, **extra)).eval()


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture
def start():
    """Makes engines, and closes them after the test."""
    engines = []

    def make(model, **options) -> HFEngine:
        engines.append(HFEngine(model, **{"eos_token_ids": [], "pad_token_id": 0, **options}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def generate_greedily(model, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def compute_logprobs(model, prompt: list[int], generation: Generation) -> torch.Tensor:
    """Log-softmax [tokens, V] of a full forward, at the positions that gave the generation's tokens."""
    ids = torch.tensor([prompt + generation.token_ids])
    with torch.no_grad():
        return model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def wait_until(holds, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_for_mixed_lengths_that_arrive_one_by_one(family, start):
    model = build_model(family)
    engine = start(model, max_batch_size=5)
    prompts = random_prompts(1, 2, 3, 17, 18, 40, 100, 300, 41, 7)
    prompts += [prompts[6], [*prompts[6][:90], 5, 6, 7], prompts[7][:299]]
    futures = []
    for prompt in prompts:
        futures.append(engine.submit(prompt, SamplingParams(temperature=0, max_tokens=12)))
        time.sleep(0.003)
    sampled = [future.result(60).token_ids for future in futures]
    assert sampled == [generate_greedily(model, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_full_forward(family, start):
    model = build_model(family)
    engine = start(model)
    prompts = random_prompts(1, 5, 64, 200, 60, 33) * 2
    futures = [engine.submit(p, SamplingParams(max_tokens=30, seed=i)) for i, p in enumerate(prompts)]
    generations = [future.result(60) for future in futures]
    for prompt, generation in zip(prompts, generations, strict=True):
        ids = torch.tensor(generation.token_ids)[:, None]
        expected = compute_logprobs(model, prompt, generation).gather(-1, ids)[:, 0]
        assert torch.allclose(torch.tensor(generation.logprobs), expected, atol=1e-4)


def test_later_turns_reuse_what_earlier_turns_computed_and_stay_exact(model, start):
    engine = start(model)
    history = random_prompts(120)[0]
    for turn in range(3):
        prompt = list(history)
        generation = engine.submit(prompt, SamplingParams(max_tokens=20, seed=turn)).result(60)
        ids = torch.tensor(generation.token_ids)[:, None]
        expected = compute_logprobs(model, prompt, generation).gather(-1, ids)[:, 0]
        assert torch.allclose(torch.tensor(generation.logprobs), expected, atol=1e-4)
        history += generation.token_ids + random_prompts(30, seed=turn + 1)[0]
    assert engine.stats()["reused_prompt_tokens"] == (120 + 19) + (120 + 50 + 19)


def test_identical_prompts_are_prefilled_once(model, start):
    engine = start(model)
    prompt = random_prompts(100)[0]
    with engine.paused():
        futures = [engine.submit(prompt, SamplingParams(max_tokens=4, seed=i)) for i in range(8)]
    assert len({tuple(future.result(60).token_ids) for future in futures}) > 1
    assert engine.stats()["reused_prompt_tokens"] == 7 * 99


def test_new_weights_forget_what_old_weights_computed(start):
    model = build_model()
    engine = start(model)
    prompt = random_prompts(100)[0]
    greedy = SamplingParams(temperature=0, max_tokens=8)
    engine.submit(prompt, greedy).result(60)
    with engine.paused(), torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        engine.weights_version = 1
    generation = engine.submit(prompt, greedy).result(60)
    assert generation.token_ids == generate_greedily(model, prompt, 8)
    assert generation.versions == [(1, 8)]
    assert engine.stats()["reused_prompt_tokens"] == 0


def test_a_generation_across_an_update_names_both_versions(model, start):
    engine = start(model)
    future = engine.submit([1, 2, 3], SamplingParams(max_tokens=200))
    wait_until(lambda: engine.stats()["tokens"] > 5)
    with engine.paused():
        engine.weights_version = 7
    [first, last] = future.result(60).versions
    assert (first[0], last[0]) == (0, 7) and first[1] > 5 and first[1] + last[1] == 200


def test_same_seed_gives_same_ids_alone_and_in_a_crowd(model, start):
    engine = start(model, kept_tokens=0)
    prompt = random_prompts(50)[0]
    params = SamplingParams(max_tokens=30, seed=42)
    alone = engine.submit(prompt, params).result(60).token_ids
    others = [
        engine.submit(p, SamplingParams(max_tokens=25, temperature=0.7))
        for p in random_prompts(9, 60, 200, 51)
    ]
    crowded = engine.submit(prompt, params).result(60).token_ids
    other_seed = engine.submit(prompt, SamplingParams(max_tokens=30, seed=43)).result(60).token_ids
    for future in others:
        future.result(60)
    assert alone == crowded != other_seed


def test_arithmetic_of_less_precision_than_the_weights_is_that_of_autocast(model, start):
    prompts = random_prompts(5, 40)
    engine = start(model, dtype=torch.bfloat16)
    futures = [engine.submit(p, SamplingParams(max_tokens=12, seed=1)) for p in prompts]
    for prompt, future in zip(prompts, futures, strict=True):
        generation = future.result()
        sampled = torch.tensor(generation.token_ids)[:, None]
        exact = compute_logprobs(model, prompt, generation).gather(1, sampled)[:, 0]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = compute_logprobs(model, prompt, generation).float().gather(1, sampled)[:, 0]
        said = torch.tensor(generation.logprobs)
        assert 0 < (said - exact).abs().mean() < 0.05
        assert (said - rounded).abs().mean() < 0.05
    assert model.dtype is torch.float32


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_tokens_follow_the_softmax(model, start, temperature):
    engine = start(model)
    prompt = random_prompts(20)[0]
    num = 1500  # each with a seed of its own, and the same ones every time: the bound below is passed or not
    params = [SamplingParams(temperature=temperature, max_tokens=1, seed=seed) for seed in range(num)]
    counts = Counter(
        future.result(60).token_ids[0] for future in [engine.submit(prompt, one) for one in params]
    )
    with torch.no_grad():
        probs = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).tolist()
    for token, prob in enumerate(probs):  # 5 standard deviations, and the rounding of a count
        assert abs(counts[token] - num * prob) <= 5 * math.sqrt(num * prob * (1 - prob)) + 1


def test_sampling_draws_by_inverse_distribution_and_cuts_tails():
    probs = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    logits = probs.log()
    one = SamplingParams()
    drawn = [sample_tokens(logits, [one], [u])[0][0] for u in (0.0, 0.49, 0.51, 0.61, 0.89, 0.91, 1 - 1e-16)]
    assert drawn == [0, 0, 1, 2, 2, 3, 3]

    def kept(params: SamplingParams) -> dict[int, float]:
        draws = [sample_tokens(logits, [params], [i / 100]) for i in range(100)]
        return {ids[0]: round(math.exp(logprobs[0]), 4) for ids, logprobs in draws}

    assert kept(SamplingParams(top_p=0.75)) == {0: 0.625, 2: 0.375}
    assert kept(SamplingParams(top_p=0.4)) == {0: 1.0}
    assert kept(SamplingParams(top_k=1)) == {0: 1.0}
    assert kept(SamplingParams(top_k=2, top_p=0.9)) == {0: 0.625, 2: 0.375}
    assert kept(SamplingParams(temperature=0, top_p=0.1)) == {0: 0.5}  # greedy: at temperature 1, uncut
    mixed = [SamplingParams(top_k=1), one, SamplingParams(temperature=0)]
    assert sample_tokens(logits.repeat(3, 1), mixed, [0.95, 0.95, 0.95])[0] == [0, 3, 0]


def test_top_p_and_temperature_of_each_row_are_its_own(model, start):
    engine = start(model)
    prompt = random_prompts(30)[0]
    settings = [
        SamplingParams(temperature=t, top_p=p, max_tokens=20) for t in (0.5, 1.0, 2.0) for p in (0.5, 1.0)
    ]
    futures = [engine.submit(prompt, params) for params in settings]
    for params, future in zip(settings, futures, strict=True):
        generation = future.result(60)
        logits = compute_logprobs(model, prompt, generation) / params.temperature
        for row, token, logprob in zip(logits, generation.token_ids, generation.logprobs, strict=True):
            ordered, order = row.softmax(-1).sort(descending=True)
            size = int((ordered.cumsum(-1) < params.top_p - 1e-6).sum()) + 1 if params.top_p < 1 else VOCAB
            assert token in order[:size]
            expected = ordered[order == token].log() - ordered[:size].sum().log()
            assert abs(expected.item() - logprob) < 1e-3


def test_ends_at_eos_at_stop_tokens_and_at_max_tokens(model, start):
    prompt = random_prompts(10)[0]
    greedy = generate_greedily(model, prompt, 20)
    end = next(token for i, token in enumerate(greedy) if i > 1 and token not in greedy[:i])
    upto = greedy[: greedy.index(end) + 1]
    engine = start(model, eos_token_ids=[end], max_model_len=30)

    def sample(**params):
        generation = engine.submit(prompt, SamplingParams(temperature=0, **params)).result(60)
        return generation.token_ids, generation.finish_reason, len(generation.logprobs)

    assert sample() == (upto, "stop", len(upto))
    assert sample(ignore_eos=True) == (greedy, "length", 20)  # max_model_len leaves room for 20
    assert sample(ignore_eos=True, stop_token_ids=(end,)) == (upto, "stop", len(upto))
    assert sample(max_tokens=2) == (greedy[:2], "length", 2)


class Letters:
    """A tokenizer whose id 0 is "a", 1 is "b", and so on."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(97 + token % 26) for token in ids)


def test_stop_texts_end_a_generation_and_stay_in_it(model, start):
    prompt = random_prompts(10)[0]
    greedy = generate_greedily(model, prompt, 20)
    text = Letters().decode(greedy, False)
    engine = start(model, tokenizer=Letters())
    params = SamplingParams(temperature=0, max_tokens=20, stop=("??", text[6:9]))
    generation = engine.submit(prompt, params).result(60)
    assert generation.finish_reason == "stop"
    assert generation.token_ids == greedy[: text.index(text[6:9]) + 3]
    with pytest.raises(ValueError, match="tokenizer"):
        start(model).submit(prompt, params)


def test_a_cancelled_request_leaves_the_batch(model, start):
    engine = start(model, max_batch_size=1)
    running = engine.submit([1, 2], SamplingParams(max_tokens=1000))
    queued = engine.submit([3, 4], SamplingParams(max_tokens=1000))
    last = engine.submit([5, 6], SamplingParams(temperature=0, max_tokens=5))
    wait_until(lambda: engine.stats()["in_flight"] == 1)
    assert running.cancel()
    assert queued.cancel()
    assert last.result(60).token_ids == generate_greedily(model, [5, 6], 5)
    with pytest.raises(CancelledError):
        running.result()
    wait_until(lambda: engine.stats()["in_flight"] == 0)
    stats = engine.stats()
    assert (stats["cancelled"], stats["finished"], stats["waiting"]) == (2, 1, 0)
    assert stats["tokens"] < 500


def test_no_forward_runs_while_paused(start):
    model = build_model().train()
    forwards = []
    model.register_forward_pre_hook(lambda module, _: forwards.append(module.training))
    engine = start(model)
    future = engine.submit([1, 2], SamplingParams(max_tokens=300))
    wait_until(lambda: engine.stats()["tokens"] > 3)
    with engine.paused():
        before = len(forwards)
        assert all(module.training for module in model.modules())
        assert model.config._attn_implementation == "sdpa"
        time.sleep(0.1)
        assert len(forwards) == before
    assert len(future.result(60).token_ids) == 300
    assert not any(forwards)
    assert all(module.training for module in model.modules())


def test_sampling_leaves_training_untouched(start):
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE, head_dim=16, attention_dropout=0.5)
    model = Qwen3ForCausalLM(config).train()
    engine = start(model)
    prompt = random_prompts(40)[0]
    sampled = engine.submit(prompt, SamplingParams(temperature=0, max_tokens=10)).result(60).token_ids
    model(torch.tensor([prompt]), labels=torch.tensor([prompt])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert sampled == generate_greedily(model.eval(), prompt, 10)


def test_an_error_fails_what_is_in_flight_and_the_engine_goes_on(start):
    model = build_model()
    fail = threading.Event()

    def maybe_fail(*_):
        if fail.is_set():
            raise MemoryError("no memory left")

    model.register_forward_pre_hook(maybe_fail)
    engine = start(model)
    futures = [engine.submit(p, SamplingParams(max_tokens=1000)) for p in random_prompts(5, 40)]
    wait_until(lambda: engine.stats()["in_flight"] == 2)
    fail.set()
    futures.append(engine.submit([1, 2, 3], SamplingParams(max_tokens=1000)))
    for future in futures:
        with pytest.raises(EngineError, match="MemoryError: no memory left") as raised:
            future.result(60)
        assert isinstance(raised.value.__cause__, MemoryError)
    fail.clear()
    greedy = engine.submit([1, 2, 3], SamplingParams(temperature=0, max_tokens=5)).result(60)
    assert greedy.token_ids == generate_greedily(model, [1, 2, 3], 5)
    assert engine.stats()["failed"] == 3


def test_weights_that_are_not_finite_fail_the_request(start):
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(EngineError, match="not finite"):
        start(model).submit([1, 2], SamplingParams(max_tokens=3)).result(60)


def test_close_fails_what_is_in_flight_and_later_requests(model):
    engine = HFEngine(model, eos_token_ids=[], pad_token_id=0, max_batch_size=1)
    futures = [engine.submit([1], SamplingParams(max_tokens=1000)) for _ in range(3)]
    engine.close()
    for future in futures:
        with pytest.raises(EngineError, match="closed"):
            future.result(1)
    with pytest.raises(EngineError, match="closed"):
        engine.submit([1], SamplingParams())


@pytest.mark.parametrize(
    ("token_ids", "says"),
    [([], "at least one"), ([1] * 64, "shorter than max_model_len=64"), ([200], "0..199")],
)
def test_prompts_that_cannot_be_sampled_from_are_refused(model, start, token_ids, says):
    with pytest.raises(ValueError, match=says):
        start(model, max_model_len=64).submit(token_ids, SamplingParams())


def test_models_with_sliding_windows_are_refused():
    config = MistralConfig(**SHAPE, sliding_window=16)
    with pytest.raises(NotImplementedError, match="sliding_window=16"):
        HFEngine(MistralForCausalLM(config), eos_token_ids=[], pad_token_id=0)


@pytest.mark.parametrize(
    ("config", "has"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "sliding_attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"sliding_window": 8}, "sliding_window=8"),
        ({"sliding_window": 8, "use_sliding_window": True}, "sliding_window=8"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_what_a_slot_cannot_hold_is_refused_by_name(config, has):
    with pytest.raises(NotImplementedError, match=f"and acme has {has}; use engine=vllm"):
        check_supported(PreTrainedConfig(**config), "acme")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"layer_types": ["full_attention"] * 2, "sliding_window": 8},
        {"sliding_window": 8, "use_sliding_window": False},
        {"sliding_window": None},
    ],
)
def test_full_attention_is_supported_though_a_window_is_named_that_no_layer_has(config):
    check_supported(PreTrainedConfig(**config), "acme")


@pytest.mark.parametrize("name", ["sliding_window", "softcap", "s_aux", "position_bias"])
def test_attention_that_needs_more_than_a_slot_has_is_refused_by_name(name):
    """What no configuration says in advance, such as Gemma 2's capped logits."""
    states = torch.ones(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match=f"cannot sample from Linear: it needs {name}"):
        slot_attention(torch.nn.Linear(1, 1), states, states, states, None, **{name: 5.0})
    slot_attention(torch.nn.Linear(1, 1), states, states, states, None, **{name: None})


def test_a_model_with_capped_attention_is_refused_before_it_samples_anything_wrong():
    shape = SHAPE | {"head_dim": 8, "attn_logit_softcapping": 5.0, "sliding_window": 4}
    model = Gemma2ForCausalLM(Gemma2Config(**shape))
    with pytest.raises(NotImplementedError, match="sliding_attention; use engine=vllm"):
        HFEngine(model, eos_token_ids=[], pad_token_id=0)


def test_free_memory_keeps_running_rows_exact(model, start):
    engine = start(model)
    prompt = random_prompts(30)[0]
    future = engine.submit(prompt, SamplingParams(temperature=0, max_tokens=100))
    wait_until(lambda: engine.stats()["tokens"] > 3)
    engine.free_memory()
    assert future.result(60).token_ids == generate_greedily(model, prompt, 100)
    engine.free_memory()
    again = engine.submit(prompt, SamplingParams(temperature=0, max_tokens=5)).result(60)
    assert again.token_ids == generate_greedily(model, prompt, 5)


@pytest.fixture
def call(model, start):
    """POST or GET against a server on loopback; returns status and JSON."""
    engine = start(model, max_model_len=1024)
    server = serve(engine)

    def request(path: str, body: dict | None = None, timeout_s: float = 60.0):
        async def run():
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            async with aiohttp.ClientSession(server.url, timeout=timeout) as session:
                method = "GET" if body is None else "POST"
                async with session.request(method, path, json=body) as response:
                    return response.status, await response.json()

        return asyncio.run(run())

    request.engine = engine  # type: ignore[attr-defined]
    yield request
    server.close()


def test_http_gives_what_the_engine_gives(model, call):
    prompt = random_prompts(20)[0]
    params = {"temperature": 0, "max_tokens": 6, "logprobs": 1, "n": 1, "top_k": -1, "stop": None}
    status, answer = call("/inference/v1/generate", {"token_ids": prompt, "sampling_params": params})
    assert status == 200
    choice = answer["choices"][0]
    assert choice["token_ids"] == generate_greedily(model, prompt, 6)
    assert choice["finish_reason"] == "length"
    assert [round(item["logprob"]) <= 0 for item in choice["logprobs"]["content"]] == [True] * 6
    assert answer["weights_versions"] == [[0, 6]]
    assert call("/health") == (200, {"status": "ok"})
    assert call("/stats")[1]["finished"] == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"token_ids": [1] * 1024}, "max_model_len"),
        ({"token_ids": ["a"]}, "token_ids must be a list of integers"),
        ({"token_ids": [1], "sampling_params": {"max_tokens": 0}}, "max_tokens must be >= 1"),
        ({"token_ids": [1], "sampling_params": {"top_p": 0}}, "top_p must be"),
        ({"token_ids": [1], "sampling_params": {"temperature": "hot"}}, "temperature must be int or float"),
        (
            {"token_ids": [1], "sampling_params": {"presence_penalty": 1}},
            "presence_penalty=1 is not supported",
        ),
        ({"token_ids": [1], "sampling_params": {"stop": "x"}}, "tokenizer"),
        ([], "JSON object"),
    ],
)
def test_http_says_what_is_wrong_with_a_request(call, body, says):
    status, answer = call("/inference/v1/generate", body)
    assert status == 400
    assert says in answer["error"]["message"]


def test_a_client_that_hangs_up_frees_its_row(call):
    with pytest.raises(TimeoutError):
        body = {"token_ids": [1], "sampling_params": {"max_tokens": 1000}}
        with call.engine.paused():
            call("/inference/v1/generate", body, timeout_s=0.3)
    wait_until(lambda: call.engine.stats()["cancelled"] == 1)
    wait_until(lambda: call.engine.stats()["in_flight"] + call.engine.stats()["waiting"] == 0)


def test_http_reports_an_engine_that_fails(start):
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    engine = start(model)
    server = serve(engine)

    async def post():
        async with aiohttp.ClientSession(server.url) as session:
            async with session.post("/inference/v1/generate", json={"token_ids": [1]}) as response:
                failed = response.status, (await response.json())["error"]["message"]
            engine.close()
            async with session.get("/health") as response:
                return failed, response.status

    (status, message), health = asyncio.run(post())
    assert (status, health) == (500, 503)
    assert "not finite" in message
    with pytest.raises(OSError):
        serve(engine, port=int(server.url.rsplit(":", 1)[1]))
    server.close()


def test_serves_on_a_socket_that_was_handed_down(model, start):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = serve(start(model), sock=sock)
        assert server.url == f"http://127.0.0.1:{sock.getsockname()[1]}"

        async def ask():
            async with aiohttp.ClientSession(server.url) as session, session.get("/health") as response:
                return response.status

        assert asyncio.run(ask()) == 200
        server.close()


def test_params_of_a_request_become_sampling_params():
    given = {"stop": "x", "stop_token_ids": [3], "seed": 5, "temperature": 1, "max_tokens": None}
    assert build_params(given) == SamplingParams(temperature=1, stop=("x",), stop_token_ids=(3,), seed=5)


NOTHING_ASKED = {
    "n": 1,
    "min_tokens": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "include_stop_str_in_output": True,
}


@pytest.mark.parametrize("name", NOTHING_ASKED)
def test_what_the_engine_does_not_do_is_refused_unless_it_asks_for_nothing(name):
    assert build_params({name: NOTHING_ASKED[name]}) == build_params({name: None}) == SamplingParams()
    for value in (2, 0.5, -1, "x", False if name == "include_stop_str_in_output" else 3):
        with pytest.raises(ValueError, match=f"sampling_params.{name}=.* is not supported .* only .* is"):
            build_params({name: value})


@pytest.mark.parametrize("name", ["logit_bias", "bad_words", "allowed_token_ids", "best_of", "no_such"])
def test_what_nobody_knows_is_refused_whatever_it_asks_for(name):
    with pytest.raises(ValueError, match=f"sampling_params.{name}=0 is not supported by the hf engine$"):
        build_params({name: 0})


def test_what_has_no_effect_on_the_draws_passes_and_top_k_of_minus_1_is_every_token():
    given = {"logprobs": 5, "prompt_logprobs": 1, "detokenize": False, "skip_special_tokens": False}
    assert build_params(given | {"output_kind": 2, "top_k": -1}) == SamplingParams()
    assert build_params({"top_k": 7}).top_k == 7
