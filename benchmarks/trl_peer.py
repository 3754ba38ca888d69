"""TRL's own GRPOTrainer on given prompts, for benchmarks/peers.py: prints a JSON line after each step.

    python benchmarks/trl_peer.py '{"model": …, "prompts": FILE, …}'

"server": the address of `trl vllm-serve`; without it the trainer samples by itself with transformers, to try
the script on a CPU. The weights are float32 under bfloat16 autocast, as in gymexp.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer


class Steps(TrainerCallback):
    """Prints the seconds of each step and what TRL logged of it."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in (logs or {}):
            now = time.monotonic()
            step = {"step": state.global_step, "seconds": now - self._began, "num_tokens": logs["num_tokens"]}
            print(json.dumps(step | {"mean_length": logs["completions/mean_length"]}), flush=True)
            self._began = now


def equal_rewards(completions: list[Any], **_: Any) -> list[float | None]:
    """Rewards as in gymexp's run: a model with random weights solves nothing, so all are equal."""
    return [0.0] * len(completions)


def main() -> None:
    settings = json.loads(sys.argv[1])
    on_gpu = torch.cuda.is_available()
    by_server: dict[str, Any] = {}
    if settings["server"]:
        by_server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": settings["server"]}
    config = GRPOConfig(
        output_dir=settings["directory"],
        max_steps=settings["steps"],
        num_generations=settings["group"],
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["accumulation"],
        max_completion_length=settings["tokens"],
        learning_rate=1e-6,
        temperature=1.0,
        beta=0.0,
        shuffle_dataset=False,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        model_init_kwargs={"dtype": "float32"},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **by_server,
    )
    prompts = [json.loads(line) for line in Path(settings["prompts"]).read_text().splitlines()]
    trainer = GRPOTrainer(
        model=settings["model"],
        reward_funcs=equal_rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[Steps()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
