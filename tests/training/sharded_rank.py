"""One of two ranks of the trainer, on a CPU, with made-up rollouts: `python sharded_rank.py CONFIG_JSON DIR
STEPS`.

Trains up to step STEPS from the newest checkpoint in DIR. The first rank writes what the engine would have
been sent before and after (`sent-<step>.safetensors`), with an adapter also what is sent of it alone, the
trainer's log-probabilities, and the final policy.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from cpu_shards import shard_on_cpus
from safetensors.torch import save_file
from transformers import TrainerCallback

from gymexp.config.schema import EnvConfig, LoraConfig, ModelConfig, OverlapConfig, RunConfig
from gymexp.data.prepare import Prepared
from gymexp.policy.model import load_model, load_tokenizer
from gymexp.rollout.batch import Batch
from gymexp.rollout.group_queue import GroupQueue
from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Task, Turn, task_of
from gymexp.training import (
    arguments,
    checkpoints,
    kept_layers,
    named_weights,
    queued_tasks,
    recomputed_layers,
)
from gymexp.training.drift import NUM_ROWS, Row, score
from gymexp.training.trainer import PolicyTrainer


class MadeUp:
    """Rollouts of random tokens, the same ones for the same step; the trainer's own log-probabilities."""

    seconds = 0.0
    logprobs: list[float]
    by_difficulty = False  # whether tasks of even numbers always have the same reward

    def __init__(self) -> None:
        self.played: list[list[str]] = []
        self.checked: list[list[list[int]]] = []  # of each check, the tokens of this rank's rows
        self.trainer: PolicyTrainer

    def __call__(self, prompts: list[str], trainer: PolicyTrainer) -> dict[str, list[Any]]:
        self.trainer = trainer
        self.played.append(prompts)
        draw = random.Random(f"{trainer.state.global_step} {trainer.accelerator.process_index}")
        rows = range(len(prompts))
        prompt = [draw.randrange(5, 500) for _ in range(draw.randrange(2, 9))]  # these are one group
        batch = Batch(
            prompt_ids=[prompt for _ in rows],
            completion_ids=[[draw.randrange(5, 500) for _ in range(draw.randrange(2, 9))] for _ in rows],
            logprobs=[],
            env_mask=[],
            rewards=[draw.random() for _ in rows],
        )
        made_up = [
            Row("e", prompt, ids, [True] * len(ids), [0.0] * len(ids), [None] * len(ids))
            for prompt, ids in zip(batch.prompt_ids, batch.completion_ids, strict=True)
        ]
        own = score(trainer, made_up, batch.completion_ids)
        self.logprobs = torch.cat(own).tolist()
        return {
            "prompt_ids": batch.prompt_ids,
            "completion_ids": batch.completion_ids,
            "logprobs": [row.tolist() for row in own],
            "env_mask": [[1] * len(row) for row in own],
            "reward": [
                1.0 if self.by_difficulty and int(key[1:]) % 2 == 0 else reward
                for key, reward in zip(prompts, batch.rewards, strict=True)
            ],
        }

    def start(self, key: str, step: int, indices: range, distribution: Any, landed: Any) -> None:
        """Lands a group of the queue at once, in another thread as the collector does."""
        failed = Failed(Task(key, "e", "a", {}), "engine", "made up")
        threading.Thread(target=lambda: landed([failed] * len(indices))).start()

    def forget(self, num_rollouts: int) -> None:
        """Nothing shows it."""

    def take(self, queue: GroupQueue, step: int) -> list[str]:
        queue.advance(step)
        return [task_of(group[0]).key for group in queue.take(lambda: None).groups]

    def landed(self, queue: GroupQueue, step: int) -> list[Outcome]:
        """Rollouts of the current weights that wait for a later batch, as many as both ranks check."""
        made_up = [
            Row("e", [5, 6], [10 + n, 20 + step], [True] * 2, [0.0] * 2, [None] * 2)
            for n in range(2 * NUM_ROWS)
        ]
        own = score(self.trainer, made_up, [row.completion_ids for row in made_up])
        return [
            Completed(
                Rollout(
                    Task(f"t{n}", "e", "a", {}),
                    [Turn(row.prompt_ids, row.completion_ids, logprobs.tolist(), [(step, 2)])],
                    1.0,
                    [],
                    step,
                )
            )
            for n, (row, logprobs) in enumerate(zip(made_up, own, strict=True))
        ]

    def write_trained(self, batch: Any, trainer: Any) -> None:
        """Nothing keeps it."""


class Room:
    """The memory of a rank: enough for every layer, or for none."""

    def __init__(self, is_enough: bool) -> None:
        self._room = 10**12 if is_enough else -1

    def room(self) -> int:
        return self._room

    def begin_peak(self) -> None:
        pass

    def allocated(self) -> int:
        return 0

    def peak(self) -> int:
        return 0


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self._step


def main() -> None:
    options, directory, steps = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    if options["trainer"].get("fsdp"):
        shard_on_cpus()
    if options["trainer"].get("deepspeed"):
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)  # accelerate's work where there are GPUs
    lora = LoraConfig(r=options.get("lora"))
    path = options.get("path", "gymexp/assets/tiny")
    dtype, packing = options.get("dtype", "float32"), options.get("packing", "none")
    model_config = ModelConfig("tiny", path, dtype=dtype, lora=lora, packing=packing)
    config = RunConfig(model=model_config, env={"e": EnvConfig("c", "a")}, trainer=options["trainer"])
    config.checkpoint.keep_last = 1
    config.overlap = OverlapConfig(**options.get("overlap", {}))
    config.dataset.sampling = options.get("sampling", "uniform")
    if "enough_memory" in options:
        enough = options["enough_memory"][int(os.environ["RANK"])]
        recomputed_layers.is_by_memory = lambda args, has_gpu: args.gradient_checkpointing
        kept_layers.GpuMemory = lambda: Room(enough)  # type: ignore[assignment, misc]
    saved = directory / "checkpoints"
    args = arguments.build(config, saved)
    model, tokenizer = load_model(model_config), load_tokenizer(model_config)
    prepared = Prepared([Task(f"t{i}", "e", "a", {}) for i in range(options.get("tasks", 64))], {}, {})
    rollouts: Any = MadeUp()
    rollouts.by_difficulty = config.dataset.sampling == "difficulty"
    trainer = PolicyTrainer(config, args, model, tokenizer, prepared, rollouts, saved)
    for callback in queued_tasks.around([StopAt(steps)], trainer):
        trainer.add_callback(callback)

    check = trainer._checks._check

    def note(trainer: PolicyTrainer, rows: Any) -> None:
        rollouts.checked.append([row.completion_ids for row in rows])
        check(trainer, rows)

    shares: list[float] = []
    if trainer._kept_layers:
        end = trainer._kept_layers.end
        trainer._kept_layers.end = lambda: shares.append(end()) or shares[-1]  # type: ignore

    trainer._checks._check = note  # type: ignore[method-assign]

    def send() -> None:
        weights = {name: tensor.cpu().clone() for name, tensor in trainer.named_weights()}
        if trainer.accelerator.is_main_process:
            save_file(weights, directory / f"sent-{trainer.state.global_step}.safetensors")
        if lora.r is None:
            return
        alone = dataclasses.replace(model_config, lora=dataclasses.replace(lora, sync="adapter"))
        adapter = {name: tensor.cpu().clone() for name, tensor in named_weights.sent(trainer, alone)}
        if trainer.accelerator.is_main_process:
            save_file(adapter, directory / "sent_adapter.safetensors")

    resume = checkpoints.latest(saved)
    if resume is None:
        send()  # as the evaluation before training does
    trainer.train_from(resume)
    send()
    trainer.save_now()
    trainer.save_policy(directory)
    played = directory / f"played-{trainer.accelerator.process_index}-{trainer.state.global_step}.json"
    played.write_text(json.dumps(rollouts.played))
    drifts = [entry["drift"] for entry in trainer.state.log_history if "drift" in entry]
    checked = {"rows": rollouts.checked, "drifts": drifts, "layers_again": shares}
    played.with_name(played.name.replace("played", "checked")).write_text(json.dumps(checked))
    if trainer.accelerator.is_main_process:
        (directory / "logprobs.json").write_text(json.dumps(rollouts.logprobs))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
