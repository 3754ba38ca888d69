"""A trainer with a policy of one layer and made-up rollouts, beside TRL's own with the same ones."""

from __future__ import annotations

import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOTrainer

from gymexp.config.schema import EnvConfig, LoraConfig, ModelConfig, RolloutConfig, RunConfig
from gymexp.data.prepare import Prepared
from gymexp.policy.model import load_model, load_tokenizer
from gymexp.rollout.outcome import Task
from gymexp.training import arguments
from gymexp.training.drift import without_dropout
from gymexp.training.trainer import PolicyTrainer, reward

TINY = Path(__file__).parents[2] / "gymexp" / "assets" / "tiny"
DEFAULTS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_generations": 4,
    "max_steps": 1,
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "optim": "sgd",
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "max_completion_length": 16,
    "logging_steps": 1,
}


def save_policy(directory: Path, num_layers: int = 1) -> Path:
    """Weights large enough that tokens differ in what they say and that a ratio moves."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class MadeUp:
    """A `rollout_func`: rows of very different lengths. `logprobs_of`: the trainer's own, else invented."""

    def __init__(self, own_logprobs: bool = False, noise: float = 0.0) -> None:
        self.seconds = 0.0
        self.own_logprobs = own_logprobs
        self.noise = noise
        self.rows: list[dict[str, Any]] = []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        draw = random.Random(trainer.state.global_step)
        self.rows = []
        for index in range(len(prompts)):
            size = 1 + 3 * (index % 5)
            mask = [1] + [draw.randrange(2) for _ in range(size - 1)]
            self.rows.append(
                {
                    "prompt_ids": [draw.randrange(5, 500) for _ in range(draw.randrange(2, 9))],
                    "completion_ids": [draw.randrange(5, 500) for _ in range(size)],
                    "env_mask": mask,
                    "reward": draw.random(),
                }
            )
        for row in self.rows:
            row["logprobs"] = [-1.0] * len(row["completion_ids"])
            if self.own_logprobs:
                own = logprobs_of(trainer, row)
                noisy = [value + self.noise * draw.gauss(0, 1) for value in own]
                row["logprobs"] = [v * m for v, m in zip(noisy, row["env_mask"], strict=True)]
        return {key: [row[key] for row in self.rows] for key in self.rows[0]}

    def write_trained(self, batch: Any, trainer: Any) -> None:
        """Nothing keeps it."""


def logprobs_of(trainer: Any, row: dict[str, Any]) -> list[float]:
    """By the model's plain forward pass, without dropout."""
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad(), without_dropout(trainer.model), trainer.accelerator.autocast():
        logits = trainer.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


class Gradients(TrainerCallback):
    """What the optimizer gets."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.flat = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


def config_of(
    policy: Path | str,
    dtype: str = "float32",
    revision: str | None = None,
    lora: Any = None,
    correction: str = "auto",
    packing: str = "none",
    **trainer: Any,
) -> RunConfig:
    model = ModelConfig("small", str(policy), revision, dtype, lora=lora or LoraConfig(), packing=packing)
    rollout = RolloutConfig(correction=correction)
    return RunConfig(model=model, env={"e": EnvConfig("c", "a")}, trainer=DEFAULTS | trainer, rollout=rollout)


def build_trainer(
    policy: Path | str,
    directory: Path,
    rollouts: Any,
    dtype: str = "float32",
    num_tasks: int = 8,
    **trainer: Any,
) -> PolicyTrainer:
    config = config_of(policy, dtype, **trainer)
    args = arguments.build(config, directory)
    prepared = Prepared([Task(f"e/train/{i}", "e", "a", {}) for i in range(num_tasks)], {}, {})
    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    return PolicyTrainer(config, args, model, tokenizer, prepared, rollouts, directory)


def build_reference(policy: Path, directory: Path, rollouts: Any, **trainer: Any) -> GRPOTrainer:
    """TRL's own trainer, as it is published."""
    config = config_of(policy, **trainer)
    return GRPOTrainer(
        model=load_model(config.model),
        reward_funcs=reward,
        args=arguments.build(config, directory),
        train_dataset=Dataset.from_dict({"prompt": [f"e/train/{i}" for i in range(8)]}),
        processing_class=load_tokenizer(config.model),
        rollout_func=rollouts,
    )


def gradient_of(trainer: Any) -> torch.Tensor:
    """Of the first optimizer step."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.flat


class Servers:
    """What stands for engines on other GPUs: weights reach them, and nothing more is asked."""

    shared = False
    sync = None
    named_weights: Any = None

    @contextmanager
    def sampling(self, version: int):
        yield

    def tend(self) -> None:
        pass

    def load_since_last(self) -> dict[str, float]:
        return {}
