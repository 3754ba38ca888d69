"""Compares the time of an update with padded rows and with each `model.packing`, in one process.

    python benchmarks/update.py --model outputs/model_4b [--groups 4:16:3000:1024 …] [--micro-batch 4]
    python benchmarks/update.py --model gymexp/assets/tiny --groups 4:4:60:20 --dtype float32      on a CPU
    python benchmarks/update.py --model outputs/model_4b --compile      and with trainer.torch_compile=true
    python benchmarks/update.py --model outputs/model_4b --kept      and with layers kept by free memory

An update is the forward and the backward pass over all rollouts, in micro-batches, as the trainer makes
them: rows of similar length share a micro-batch, and with `tree` rows of the same prompt. Each of --groups
has four numbers: of groups, of rollouts in each, of tokens of their prompt, and of tokens of the longest
completion; the shortest has a quarter of it. The layouts are timed in turns, so that a busy machine slows all
of them: compare the ratios. A round before the measured ones warms up, and compiles. `computed` counts the
tokens that a layer sees. `--compile` times both layouts of packs with compiled layers as well, and shows the
time of the compilations apart: by how much the first round took longer than the others. torch keeps what it
compiled for a later process, so an empty folder in TORCHINDUCTOR_CACHE_DIR makes it compile everything.
Without `--kept` the backward pass computes all layers again. With it, each layout is also timed as the
trainer does it on a GPU by default (`every_n_layers=auto`), and the share of layers that it computes again is
shown.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import facts
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.utils import add_fused_lm_head

from gymexp.config.packing import Compilation
from gymexp.training import packing, padding
from gymexp.training.compiled_layers import compile_layers
from gymexp.training.kept_layers import GpuMemory, KeptLayers
from gymexp.training.scoring import Scorer

LAYOUTS = ("none", "varlen", "tree")
COMPILED = " compiled"  # in the name of a layout whose layers are compiled
KEPT = " kept"  # ends the name of a layout whose layers are computed again only if memory lacks


def main() -> None:
    args = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.to(device).train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    packing.prepare(model)
    batches = {layout: build_batches(args, layout, device) for layout in LAYOUTS}
    forwards = {"": forwards_of(model)}
    if args.compile:
        compile_layers(model, Compilation("inductor", None))
        forwards[COMPILED] = forwards_of(model)
        batches |= {layout + COMPILED: batches[layout] for layout in LAYOUTS if layout != "none"}
    if args.kept:
        batches |= {name + KEPT: of_name for name, of_name in batches.items()}
    seconds, computed, again, graphs = time_rounds(model, batches, forwards, args)
    real = sum(int(b["prompt_mask"].sum() + b["completion_mask"].sum()) for b in batches["none"])
    medians = {name: statistics.median(seconds[name][1:]) for name in batches}
    print(f"{real} tokens in {args.rounds} rounds, {args.dtype} on {device}")
    for name in batches:
        ratio = medians["none"] / medians[name]
        layers = f", layers again {again[name]:.2f}" if name in again else ""
        print(f"  {name:<22}{medians[name]:>8.2f} s  {ratio:>5.2f}x  computed {computed[name]}{layers}")
    compiling = {name: seconds[name][0] - medians[name] for name in batches if COMPILED in name}
    if compiling:
        print(f"  {graphs} graphs were compiled in {sum(compiling.values()):.1f} s")
    facts.write(
        args.output,
        {
            "machine": facts.machine(),
            "model": facts.model(args.model),
            "arguments": {k: v for k, v in vars(args).items() if k not in ("model", "output")},
            "torch": torch.__version__,
            "tokens": real,
            "seconds": {name: spent[1:] for name, spent in seconds.items()},
            "computed": computed,
            "layers_again": again,
            "faster_than_padded": {name: medians["none"] / medians[name] for name in batches},
            "compiling": {"graphs": graphs, "seconds": compiling},
        },
    )


def time_rounds(
    model: Any,
    batches: dict[str, list[dict[str, torch.Tensor]]],
    forwards: dict[str, dict[Any, Callable[..., Any]]],
    args: argparse.Namespace,
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, float], int]:
    """Returns the seconds of each layout's updates, the first of which warms up; the number of tokens that
    its layers saw; the share of layers that the last update computed again, if memory decides; and the number
    of compiled graphs, all of them in the first round.

    forwards: the forward pass of each layer that is compiled, and of one that is not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    computed: dict[str, int] = {}
    again: dict[str, float] = {}
    kept = {name: KeptLayers(model, GpuMemory()) for name in batches if name.endswith(KEPT)}
    graphs = 0
    for number in range(args.rounds + 1):
        for name in batches:
            layout = name.split()[0]
            for layer, forward in forwards[COMPILED if COMPILED in name else ""].items():
                layer.forward = forward
            if not args.no_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if layers := kept.get(name):
                layers.install()
            dtype = getattr(torch, args.dtype)
            spent, computed[name], shares = time_update(model, layout, batches[name], dtype, layers)
            seconds[name].append(spent)
            if shares:
                again[name] = statistics.mean(shares)
        if number == 0:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs, "the first round must compile everything"
    return seconds, computed, again, graphs


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
    parser.add_argument("--compile", action="store_true", help="packs with compiled layers as well")
    parser.add_argument("--kept", action="store_true", help="layers kept by free memory as well; needs a GPU")
    parser.add_argument("--output", type=Path, default=facts.RESULTS / "update.json")
    args = parser.parse_args()
    if args.kept and (args.no_checkpointing or not torch.cuda.is_available()):
        parser.error("--kept must be left out without a GPU, and with --no-checkpointing, got --kept")
    return args


def forwards_of(model: torch.nn.Module) -> dict[Any, Callable[..., Any]]:
    """Returns each decoder layer with its present forward pass."""
    return {m: m.forward for m in model.modules() if isinstance(m, GradientCheckpointingLayer)}


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
    model: Any,
    layout: str,
    batches: list[dict[str, torch.Tensor]],
    dtype: torch.dtype,
    kept: KeptLayers | None,
) -> tuple[float, int, list[float]]:
    """Returns the seconds of an update, the number of tokens that its layers saw, and the share of layers
    that each micro-batch computed again; no shares without `kept`."""
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
    shares = []
    began = now(device)
    for batch in batches:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        width = batch["completion_ids"].size(1)
        logprobs = scorer(model, ids, mask, width, compute_entropy=True)[0]
        (logprobs * batch["completion_mask"]).sum().backward()
        if kept and (share := kept.end()) is not None:
            shares.append(share)
    spent = now(device) - began
    hook.remove()
    model.zero_grad()
    gc.collect()
    return spent, computed, shares


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
