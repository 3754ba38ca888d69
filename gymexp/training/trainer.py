"""PolicyTrainer, which is TRL's GRPOTrainer with measured phases, the drift check and sealed checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from gymexp.config.correction import correction_of
from gymexp.config.packing import compilation_of
from gymexp.config.schema import RunConfig
from gymexp.data.prepare import Prepared
from gymexp.engine.replicas import NamedTensors, TensorSpecs
from gymexp.policy import lora
from gymexp.policy.hub_snapshot import directory_of
from gymexp.policy.model import end_token_ids, save_policy
from gymexp.record.directory import RunDirectory
from gymexp.rollout.outcome import Outcome
from gymexp.training import (
    batches,
    checkpoints,
    compiled_layers,
    drift,
    kept_layers,
    named_weights,
    old_logprobs,
    packing,
    padding,
    queued_tasks,
    recomputed_layers,
)
from gymexp.training.engine_client import ServerSampling
from gymexp.training.ranks import know_cpu_ranks, on_main_rank
from gymexp.training.rollout_func import Rollouts
from gymexp.training.scoring import Scorer
from gymexp.training.sharding import gather_head
from gymexp.training.spans import Spans, StepSpans
from gymexp.training.training_pass import TrainingPass

log = logging.getLogger(__name__)


class _NoSilentFailures(logging.Filter):
    """Drops TRL's warning about rollouts without a reward, which gymexp counts as `<env>/failed`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "reward functions returned None" not in record.getMessage()


def reward(reward: list[float | None], **_: Any) -> list[float | None]:
    """Returns the environments' rewards, which `rollout_func` returned; None for a rollout without one."""
    return reward


class PolicyTrainer(GRPOTrainer):
    """Trains the policy on rollouts. Every log entry has the seconds of each phase of the step (`time/*`)."""

    def __init__(
        self,
        config: RunConfig,
        args: GRPOConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prepared: Prepared,
        rollouts: Rollouts,
        directory: Path,
    ) -> None:
        """args: TRL's arguments, built by `arguments.build` before the model was loaded. directory: for the
        checkpoints."""
        logging.getLogger("trl.trainer.grpo_trainer").addFilter(_NoSilentFailures())
        self._config = config
        self._rollouts = rollouts
        self._seconds = dict.fromkeys(("rollout", "sync", "logprobs", "update", "evaluation"), 0.0)
        self._step_began = time.monotonic()
        self.spans = Spans()
        self.pad_token_id: int = tokenizer.pad_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self.grpo = args
        self._directory = directory
        self._correction = correction_of(config)
        self._checks = drift.Checks(config)
        self._pass = TrainingPass(config, args, self._correction, rollouts)
        self._row_envs: list[str | None] | None = None  # of the last rollouts, for `TrainingPass.begin`
        self._skips_pass = False  # whether TRL is about to compute old log-probabilities that nothing reads
        self._engine: ServerSampling | None = None
        self._tasks = prepared.train  # in the first epoch's order
        self._schedule = batches.build_schedule(args, len(prepared.train))
        self.batch_tasks = queued_tasks.build(config, prepared.train, self._schedule.batch_tasks, rollouts)
        self._tokenizer = tokenizer
        self.stopped = False  # whether training ended before its last step, on request or pruned
        super().__init__(
            model=model,
            reward_funcs=reward,
            args=self.grpo,
            train_dataset=Dataset.from_dict({"prompt": self.batch_tasks.prompts}),
            processing_class=tokenizer,
            rollout_func=self._play,  # pyright: ignore[reportArgumentType]
            peft_config=lora.build_peft_config(config.model.lora, model) if config.model.lora.r else None,
        )
        # TRL counts a rollout as truncated unless its last token is one of these.
        self.eos_token_ids = end_token_ids(tokenizer, directory_of(config.model))
        self._kept_layers: kept_layers.KeptLayers | None = None
        if recomputed_layers.is_by_memory(args, torch.cuda.is_available()):
            self._kept_layers = kept_layers.KeptLayers(self.model, kept_layers.GpuMemory())
        recomputed_layers.keep_options(self.model, self._kept_layers)
        if self.is_fsdp_enabled:
            self.model.register_forward_pre_hook(gather_head)  # pyright: ignore[reportOptionalMemberAccess]
        self.add_callback(StepSpans(self.spans))
        self.add_callback(batches.Epochs(lambda: self._schedule))
        trl_score = super()._get_per_token_logps_and_entropies
        self._scorer = Scorer(config.model.packing, trl_score, self.accelerator.autocast)
        if config.model.packing != "none":
            for one in (self.model, self.ref_model):
                if one is not None:
                    packing.prepare(one)
                    if compilation := compilation_of(config):
                        compiled_layers.compile_layers(one, compilation)
        if self._correction == "decoupled":
            self._stand_in_for_vllm()  # TRL corrects no other engine.
        self.remove_callback(PrinterCallback)  # The live view shows the numbers, and metrics.jsonl has them.

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """Adds metrics of this step's batch. TRL averages them until the next log entry."""
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def log_evaluation(self, metrics: dict[str, float], seconds: float) -> None:
        """Logs the metrics of an evaluation as an entry of their own. TRL's `log` would mix the metrics of
        the training step into it. seconds: duration of the evaluation."""
        self._seconds["evaluation"] += seconds
        Trainer.log(self, metrics)

    def sample_with_servers(self, engine: ServerSampling, version: int | None) -> None:
        """Keeps the servers' weights up to date from now on.

        version: of the servers' current weights, in optimizer steps done; None if it is unknown.
        """
        self._engine = engine
        self._engine_version = version
        engine.named_weights = self._weights_without_other_ranks
        self._tensor_specs: TensorSpecs | None = None
        self._stand_in_for_vllm()

    def _stand_in_for_vllm(self) -> None:
        """Makes the trainer stand in for TRL's own client, which supports only one server. TRL then calls
        `sync_weights` before the rollouts of each new step, and makes importance weights if they are on."""
        self.use_vllm = True
        self.vllm_mode = "server"
        self.vllm_generation = self
        self._last_loaded_step = -1

    def sync_weights(self) -> None:
        """Sends the current weights to the engine, unless it still has them. Every rank must call this
        method, because gathering a sharded parameter is a collective operation."""
        step = self.state.global_step
        if self._engine is None or (step == self._engine_version and not self._engine.shared):
            return
        began = time.monotonic()
        with self.spans.phase("sync", step):
            self._send_weights(self._engine, step)
        self._seconds["sync"] += time.monotonic() - began

    def _send_weights(self, engine: ServerSampling, step: int) -> None:
        if engine.shared:
            torch.cuda.empty_cache()  # vLLM is about to wake up on this GPU and needs the memory.
        if self._tensor_specs is None:
            self._tensor_specs = [(name, t.dtype, list(t.shape)) for name, t in self._sent_weights()]
        if engine.sync is not None:
            engine.sync.update(step, self._tensor_specs, self._sent_weights())
        else:
            for _ in self._sent_weights():
                pass  # This rank only takes part in gathering the parameters.
        self._engine_version = step

    def _sent_weights(self) -> NamedTensors:
        return named_weights.sent(self, self._config.model)

    def named_weights(self) -> NamedTensors:
        """Yields the policy's parameters in `model.dtype`, under the names of its checkpoint. With LoRA, the
        adapter is merged into them. Every rank must iterate over all of them."""
        return named_weights.whole(self, self._config.model)

    def _weights_without_other_ranks(self) -> NamedTensors | None:
        """Returns the policy's parameters for a caller on the first rank alone; None if they are sharded,
        because the other ranks do not take part."""
        is_sharded = self.accelerator.num_processes > 1 and (self._dist.is_fsdp or self._dist.is_zero3)
        return None if is_sharded else self.named_weights()

    def check_samples(self, outcomes: Sequence[Outcome]) -> None:
        """Checks draws on some rollouts, if a check is due; and drift, if the training pass cannot show it.

        outcomes: this rank's part of the batch. Raises DriftError or DrawError, on every rank alike.
        """
        self._row_envs = drift.compared_envs(outcomes, self.state.global_step)
        with self.spans.phase("logprobs", self.state.global_step + 1):
            self._checks.check(self, outcomes)

    def _play(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        """TRL's `rollout_func`."""
        with self.spans.phase("rollout", self.state.global_step + 1):
            batch = self._rollouts(prompts, self)
        self.batch_tasks.learn(batch["reward"], self)
        return batch

    def train_from(self, checkpoint: Path | None) -> None:
        """Trains to the end, from a checkpoint or, if that is None, from the start."""
        know_cpu_ranks()
        first_step = checkpoints.step_of(checkpoint) if checkpoint else 0
        if checkpoint:
            self._schedule = self._schedule.resumed_at(first_step, batches.read_epoch(checkpoint))
            batches.resume_generation(self, checkpoint, first_step)
        if self.args.max_steps < 0:
            self.args.max_steps = self._schedule.num_steps(self.args.num_train_epochs)
        self.batch_tasks.begin(self, checkpoint)
        if self._engine:
            self._engine.load_since_last()  # from here on
        self._step_began = time.monotonic()
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.spans.end_all()

    def _get_train_sampler(self, dataset: Any = None) -> batches.TaskSampler:
        return self.batch_tasks.sampler(self._tasks, self._config.dataset, self._schedule, self.grpo)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers checks for the last step only after it has trained one. A run that is resumed from the
        # checkpoint of its last step, as it ended during the last evaluation, would train a step too many.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is buffered or self._buffered_inputs is None:
            return inputs
        if padding.may_regroup(self.grpo, self.aux_loss_enabled):
            is_tree = self._config.model.packing == "tree"
            group = packing.group_by_prompt if is_tree else padding.group_by_length
            self._buffered_inputs = group(self._buffered_inputs)
        elif self.importance_sampling_level == "sequence":
            self._buffered_inputs = [
                old_logprobs.rescored(batch, self._scorer.in_one_pass, self.model)
                for batch in self._buffered_inputs
            ]
        return self._buffered_inputs[self._step % len(self._buffered_inputs)]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        **more: Any,
    ) -> Any:
        if self._skips_pass:  # TRL asks for the old log-probabilities before those of the reference.
            self._skips_pass = False
            return torch.zeros(input_ids.size(0), logits_to_keep, device=input_ids.device), None, None
        scored = self._scorer(model, input_ids, attention_mask, logits_to_keep, **more)
        if torch.is_grad_enabled():
            self._pass.logprobs = scored[0].detach()
        return scored

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        part = old_logprobs.for_loss(padding.trim(inputs), self._correction)
        loss = super()._compute_loss(model, part)
        self._pass.end(part, self, checks_drift=not self._checks.has_dropout(model))
        return loss

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        began, sync_before = time.monotonic(), self._seconds["sync"]
        with self.spans.phase("rollout", self.state.global_step + 1):
            inputs = self.batch_tasks.fill(inputs, self)
        with self.spans.phase("logprobs", self.state.global_step + 1):
            self._skips_pass = is_skipped = old_logprobs.is_pass_unused(self.grpo, self._correction)
            output = super()._generate_and_score_completions(inputs)
            if is_skipped:
                del output["old_per_token_logps"]
            self._pass.begin(output, self._row_envs, self)
        if self._engine is not None and self._engine.shared:
            # The engine sleeps now. If this step collects again, another sync must wake it.
            self._last_loaded_step = -1
        rollouts_and_sync = self._rollouts.seconds + self._seconds["sync"] - sync_before
        self._seconds["rollout"] += self._rollouts.seconds
        self._seconds["logprobs"] += time.monotonic() - began - rollouts_and_sync
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        before = sum(self._seconds.values())
        began = time.monotonic()
        self._check_before_update(in_backward=True)
        loss = super().training_step(*args, **kwargs)
        if self._kept_layers and (share := self._kept_layers.end()) is not None:
            self.add_metrics({"update/recomputed_layers": share})
        self._check_before_update(in_backward=False)
        generated = sum(self._seconds.values()) - before
        self._seconds["update"] += time.monotonic() - began - generated
        return loss

    def _check_before_update(self, in_backward: bool) -> None:
        began = time.monotonic()
        waited = self._checks.before_update(self, in_backward)
        self._seconds["rollout"] += waited
        self._seconds["logprobs"] += time.monotonic() - began - waited

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.monotonic()
            steps = max(1, self.args.logging_steps)
            total = (now - self._step_began) / steps
            spent = {f"time/{name}": seconds / steps for name, seconds in self._seconds.items()}
            logs |= {"time/step": total, **spent, "time/other": total - sum(spent.values())}
            if self._config.overlap.max_staleness:
                logs["idle/trainer"] = spent["time/rollout"] / total
            if self._engine:
                logs |= self._engine.load_since_last()
            self._step_began = now
            self._seconds = dict.fromkeys(self._seconds, 0.0)
        super().log(logs, start_time)

    @property
    def _sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # The checkpoint of a sharded run has the weights as shards, so it needs no gathered weights as well.
        if not self._sharded or self.args.save_only_model:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        target = self._directory / f"checkpoint-{step}"
        with self.spans.phase("checkpoint", step):
            with checkpoints.writing(target) if self.accelerator.is_main_process else nullcontext():
                super()._save_checkpoint(model, trial)
                self.batch_tasks.save(target, self)
                if step % self._schedule.steps_per_batch:
                    batches.save_generation(target, self.args.process_index, self._buffered_inputs)
                self.accelerator.wait_for_everyone()  # Every rank must have written its part before the seal.
            self._prune()

    def _prune(self) -> None:
        if self.accelerator.is_main_process:
            scores = checkpoints.read_scores(RunDirectory(self._directory.parent).metrics, self._config.env)
            checkpoints.prune(self._directory, self._config.checkpoint, scores)

    def save_policy(self, run: Path) -> None:
        """Writes the final weights to `<run>/model`. With LoRA, the adapter is merged into them, and written
        to `<run>/adapter` as well. Nothing may be trained or sampled afterwards.
        """
        with self.spans.phase("save", self.state.global_step):
            self._save_policy(run)

    def _save_policy(self, run: Path) -> None:
        main = self.accelerator.is_main_process
        policy: Any = self.accelerator.unwrap_model(self.model)
        weights = {name: tensor.cpu() for name, tensor in self.named_weights() if main}
        if self._config.model.lora.r:
            trained = {name: tensor.cpu() for name, tensor in named_weights.adapter(self) if main}
            if main:
                policy.save_pretrained(run / "adapter", state_dict=trained)
                lora.name_base(run / "adapter", self._config.model)
                policy = policy.unload()
        if main:
            save_policy(policy, weights, self._tokenizer, run / "model")
        # Gathering on a GPU is asynchronous: if another rank ended now, the first rank would wait for ever.
        self.accelerator.wait_for_everyone()

    def save_now(self) -> None:
        """Saves a checkpoint of the last finished step unless a whole one exists, then deletes old
        checkpoints, with the scores of the last evaluation."""
        target = self._directory / f"checkpoint-{self.state.global_step}"
        is_saved = on_main_rank(self.accelerator, lambda: checkpoints.whole(target))
        if self.state.global_step and not is_saved:
            self._save_checkpoint(self.model, None)
        else:
            self._prune()
