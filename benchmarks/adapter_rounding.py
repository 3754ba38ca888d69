"""Compares what a bfloat16 engine gets of an adapter's first steps: merged into weights, or as an adapter.

    python benchmarks/adapter_rounding.py
    python benchmarks/adapter_rounding.py --model DIRECTORY --rank 32 --learning-rates 1e-5

An adapter after n steps of Adam is made up: each entry of B has the size n times the learning rate, with a
random sign. "change" is the mean absolute change of the log-probabilities of random tokens by this adapter,
in nats. "lost" is the share of the change that is lost if the weights are rounded to bfloat16 after the merge
(`model.lora.sync=merged`), or if A and B are rounded (`=adapter`): the size of the error's vector over that
of the change. All sums are computed in float32, so that nothing but this rounding counts.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from gymexp.config.schema import LoraConfig
from gymexp.policy import lora

TINY = Path(__file__).resolve().parent.parent / "gymexp" / "assets" / "tiny"
ROUNDED = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-5, 1e-4])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 10, 100])
    args = parser.parse_args()
    print("learning rate  steps    change   lost: merged  adapter")
    for rate in args.learning_rates:
        for steps in args.steps:
            change, merged, adapter = measure(args.model, args.rank, rate * steps)
            print(f"{rate:13g}  {steps:5}  {change:8.1e}  {merged:12.1%}  {adapter:7.1%}", flush=True)


def measure(path: Path, rank: int, size: float) -> tuple[float, float, float]:
    """Returns the change, and the shares of it that are lost: merged, as an adapter. size: of B's entries."""
    base = load(path)
    torch.manual_seed(0)
    policy: Any = get_peft_model(base, lora.build_peft_config(LoraConfig(r=rank), base)).eval()
    ids = torch.randint(5, 1500, (8, 100))
    before = logprobs(policy, ids)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if ".lora_B." in name:
                parameter.copy_(torch.randn_like(parameter).sign() * size)
        change = logprobs(policy, ids) - before
        merged = load(path)
        weights = dict(merged.named_parameters())
        for name, tensor in lora.merged_parameters(policy, lambda _: nullcontext()):
            weights[name].copy_(tensor.to(ROUNDED))
        for parameter in trained.values():
            parameter.copy_(parameter.to(ROUNDED))
    errors = (logprobs(model, ids) - before - change for model in (merged, policy))
    lost_merged, lost_adapter = ((error.norm() / change.norm()).item() for error in errors)
    return change.abs().mean().item(), lost_merged, lost_adapter


def load(path: Path) -> Any:
    """Loads a model whose weights are bfloat16's, to compute with them in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(ROUNDED).float()
    return model


@torch.no_grad()
def logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities (B, T - 1) of all tokens of `ids` (B, T) but the first ones."""
    logits = model(ids).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


if __name__ == "__main__":
    main()
