"""Compares the tokens per second of the hf engine and of `model.generate`.

    python benchmarks/hf_engine.py [--rounds 3] [--new-tokens 64]

Both have the same model (Qwen3's shape, random weights), prompts and number of new tokens. They run in turns,
so that a busy machine slows both: compare the ratios.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from gymexp.engine.hf.engine import HFEngine
from gymexp.engine.hf.sampling import SamplingParams


def build_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=4096,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def build_prompts(kind: str) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    groups, copies, length = {
        "32 x 300": (32, 1, 300),
        "64 x 300": (64, 1, 300),
        "8 x 8 copies x 600": (8, 8, 600),
    }[kind]
    distinct = torch.randint(5, 4096, (groups, length), generator=generator).tolist()
    return [prompt for prompt in distinct for _ in range(copies)]


def time_generate(model: Any, prompts: list[list[int]], new_tokens: int) -> float:
    ids = torch.tensor(prompts, device=model.device)
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
    return time.perf_counter() - start


def time_engine(
    model: Qwen3ForCausalLM, prompts: list[list[int]], new_tokens: int, gap_s: float = 0.0
) -> float:
    engine = HFEngine(model, eos_token_ids=[], pad_token_id=0, max_batch_size=len(prompts))
    params = SamplingParams(max_tokens=new_tokens)
    start = time.perf_counter()
    futures = []
    for prompt in prompts:
        futures.append(engine.submit(prompt, params))
        time.sleep(gap_s)
    for future in futures:
        future.result()
    seconds = time.perf_counter() - start
    engine.close()
    return seconds


def time_turns(model: Qwen3ForCausalLM, new_tokens: int, turns: int, kept_tokens: int) -> float:
    """Returns the seconds of 32 rollouts of several turns. A turn's prompt is the last turn's prompt and
    reply, and 100 new ids."""
    engine = HFEngine(model, eos_token_ids=[], pad_token_id=0, kept_tokens=kept_tokens)
    histories = build_prompts("32 x 300")
    extra = build_prompts("32 x 300")
    start = time.perf_counter()
    for turn in range(turns):
        futures = [engine.submit(ids, SamplingParams(max_tokens=new_tokens)) for ids in histories]
        for ids, more, future in zip(histories, extra, futures, strict=True):
            ids += future.result().token_ids + more[turn * 100 : turn * 100 + 100]
    seconds = time.perf_counter() - start
    engine.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    model = build_model()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{size:.1f}M parameters, {torch.get_num_threads()} threads, {args.new_tokens} new tokens a request, "
        f"median of {args.rounds} rounds in turns"
    )
    print(f"{'prompts':<20}{'arrival':<12}{'generate tok/s':>16}{'engine tok/s':>14}{'ratio':>8}")
    for kind in ("32 x 300", "64 x 300", "8 x 8 copies x 600"):
        prompts = build_prompts(kind)
        tokens = len(prompts) * args.new_tokens
        plain, at_once, staggered = [], [], []
        for _ in range(args.rounds):
            plain.append(tokens / time_generate(model, prompts, args.new_tokens))
            at_once.append(tokens / time_engine(model, prompts, args.new_tokens))
            staggered.append(tokens / time_engine(model, prompts, args.new_tokens, gap_s=0.005))
        base = statistics.median(plain)
        for arrival, rates in (("at once", at_once), ("every 5 ms", staggered)):
            rate = statistics.median(rates)
            print(f"{kind:<20}{arrival:<12}{base:>16.0f}{rate:>14.0f}{rate / base:>8.2f}")
    without = statistics.median(time_turns(model, 32, 3, kept_tokens=0) for _ in range(args.rounds))
    kept = statistics.median(time_turns(model, 32, 3, kept_tokens=65_536) for _ in range(args.rounds))
    print(
        f"32 rollouts x 3 turns x 32 tokens: {without:.2f} s without kept rows, {kept:.2f} s with them "
        f"({without / kept:.2f})"
    )


if __name__ == "__main__":
    main()
