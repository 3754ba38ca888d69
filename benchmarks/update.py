"""Compares the time of an update with padded rows and with each `model.packing`, in one process.

    python benchmarks/update.py --model outputs/model_4b [--groups 4:16:3000:1024 …] [--micro-batch 4]
    python benchmarks/update.py --model gymexp/assets/tiny --groups 4:4:60:20 --dtype float32      on a CPU

An update is the forward and the backward pass over all rollouts, in micro-batches, as the trainer makes
them: rows of similar length share a micro-batch, and with `tree` rows of the same prompt. Each of --groups
has four numbers: of groups, of rollouts in each, of tokens of their prompt, and of tokens of the longest
completion; the shortest has a quarter of it. The layouts are timed in turns, so that a busy machine slows all
of them: compare the ratios. A round before the measured ones warms up. `computed` counts the tokens that a
layer sees.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from pathlib import Path
from typing import Any

import facts
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from gymexp.training import packing, padding
from gymexp.training.scoring import Scorer

LAYOUTS = ("none", "varlen", "tree")


def main() -> None:
    args = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.to(device).train()
    if not args.no_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    packing.prepare(model)
    batches = {layout: build_batches(args, layout, device) for layout in LAYOUTS}
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    computed: dict[str, int] = {}
    for number in range(args.rounds + 1):
        for layout in LAYOUTS:
            spent, computed[layout] = time_update(model, layout, batches[layout], dtype)
            if number:
                seconds[layout].append(spent)
    real = sum(int(b["prompt_mask"].sum() + b["completion_mask"].sum()) for b in batches["none"])
    medians = {layout: statistics.median(seconds[layout]) for layout in LAYOUTS}
    print(f"{real} tokens in {args.rounds} rounds, {args.dtype} on {device}")
    for layout in LAYOUTS:
        ratio = medians["none"] / medians[layout]
        print(f"  {layout:<7}{medians[layout]:>8.2f} s  {ratio:>5.2f}x  computed {computed[layout]}")
    facts.write(
        args.output,
        {
            "machine": facts.machine(),
            "model": facts.model(args.model),
            "arguments": {k: v for k, v in vars(args).items() if k not in ("model", "output")},
            "torch": torch.__version__,
            "tokens": real,
            "seconds": seconds,
            "computed": computed,
            "faster_than_padded": {layout: medians["none"] / medians[layout] for layout in LAYOUTS},
        },
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a model directory, e.g. of make_model.py")
    parser.add_argument("--groups", nargs="+", default=["2:16:5900:1024", "2:16:200:1024"])
    parser.add_argument("--micro-batch", type=int, default=4, help="rollouts in one pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--no-checkpointing", action="store_true", help="keep the activations of all layers")
    parser.add_argument("--output", type=Path, default=facts.RESULTS / "update.json")
    return parser.parse_args()


def build_batches(args: argparse.Namespace, layout: str, device: str) -> list[dict[str, torch.Tensor]]:
    """Returns the micro-batches that the trainer would make of the same rollouts."""
    draw = random.Random(0)
    vocabulary = facts.model(args.model)["vocab_size"]
    rows = []
    for group in args.groups:
        count, size, prompt_tokens, most = map(int, group.split(":"))
        for _ in range(count):
            prompt = [draw.randrange(vocabulary) for _ in range(prompt_tokens)]
            for _ in range(size):
                tokens = draw.randrange(max(1, most // 4), most + 1)
                rows.append((prompt, [draw.randrange(vocabulary) for _ in range(tokens)]))
    draw.shuffle(rows)
    longest = [max(len(row[part]) for row in rows) for part in (0, 1)]
    batches = []
    for first in range(0, len(rows), args.micro_batch):
        some = rows[first : first + args.micro_batch]
        batch = {}
        for part, name in enumerate(("prompt", "completion")):
            ids = torch.zeros(len(some), longest[part], dtype=torch.long)
            mask = torch.zeros_like(ids)
            for index, row in enumerate(some):
                size = len(row[part])
                own = slice(longest[part] - size, None) if part == 0 else slice(size)
                ids[index, own], mask[index, own] = torch.tensor(row[part]), 1
            batch |= {f"{name}_ids": ids.to(device), f"{name}_mask": mask.to(device)}
        batches.append(batch)
    group_rows = packing.group_by_prompt if layout == "tree" else padding.group_by_length
    return [padding.trim(batch) for batch in group_rows(batches)]


def time_update(
    model: Any, layout: str, batches: list[dict[str, torch.Tensor]], dtype: torch.dtype
) -> tuple[float, int]:
    """Returns the seconds of an update, and the number of tokens that its layers saw."""
    device = model.device.type
    computed = 0

    def autocast() -> torch.autocast:
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def count(module: Any, args: Any, options: dict[str, Any]) -> None:
        nonlocal computed
        computed += options["input_ids"].numel()

    def padded(model: Any, ids: torch.Tensor, mask: torch.Tensor, width: int, *_: Any, **__: Any) -> Any:
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-width] = -100
        with autocast():
            output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        return output.log_probs[:, -width:], output.entropy[:, -width:], None

    scorer = Scorer(layout, padded, autocast)
    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    began = now(device)
    for batch in batches:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        width = batch["completion_ids"].size(1)
        logprobs = scorer(model, ids, mask, width, compute_entropy=True)[0]
        (logprobs * batch["completion_mask"]).sum().backward()
    spent = now(device) - began
    hook.remove()
    model.zero_grad()
    gc.collect()
    return spent, computed


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
