"""What the training pass itself shows of the engine: the ratios of a token's two probabilities, the share of
them that the correction cuts off, and the drift.

The pass computes the log-probability of every token that it trains on. So these numbers need no pass of their
own, cover all of these tokens at every step, and are known before the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gymexp.config.schema import RunConfig
from gymexp.training.drift import Tally, check_drift
from gymexp.training.padding import effective_sample

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    from gymexp.training.rollout_func import Rollouts
    from gymexp.training.trainer import PolicyTrainer

_CLIPPED_ON_BOTH_SIDES = frozenset(("grpo", "bnpo", "dr_grpo", "dapo", "luspo"))
_MAX_DIFFERENCE = 300.0  # nats; the square of its exponential is still a float64
_NUM_SUMS = 7


class TrainingPass:
    """Sums over the micro-batches of an optimizer step, and the log-probabilities of a batch's first pass."""

    def __init__(self, config: RunConfig, args: GRPOConfig, correction: str, rollouts: Rollouts) -> None:
        """correction: of `correction_of`. rollouts: writes the records of training."""
        self._config = config
        self._args = args
        self._correction = correction
        self._rollouts = rollouts
        self._envs = list(config.env)
        self.logprobs: torch.Tensor | None = None  # of the micro-batch, by the pass that computes its loss
        self._unwritten: dict[str, Any] | None = None  # a batch whose records wait for its log-probabilities
        self._of_batch: torch.Tensor | None = None  # (B, T): these, in the order of the rollouts
        self._seen: torch.Tensor | None = None  # (B): whether a row has them
        self._env_of_row: torch.Tensor | None = None  # (B): the number of its environment; -1: not compared
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(_NUM_SUMS, dtype=torch.float64)
        self._max = torch.zeros((), dtype=torch.float64)
        self._drift = torch.zeros(len(self._envs), 4, dtype=torch.float64)

    def begin(self, batch: dict[str, Any], envs: Sequence[str | None] | None, trainer: PolicyTrainer) -> None:
        """Begins a batch that was sampled. Adds `row` (B), the number of each rollout, which survives TRL's
        shuffling. Writes the records of training, or leaves them to the batch's first pass.

        envs: the environment of each rollout that the current weights sampled, and None for the others; None
        if nothing is known of the rollouts.
        """
        count, device = batch["completion_ids"].size(0), batch["completion_ids"].device
        batch["row"] = torch.arange(count, device=device)
        self._of_batch = torch.full(batch["completion_ids"].shape, torch.nan, device=device)
        self._seen = torch.zeros(count, dtype=torch.bool, device=device)
        numbers = [-1 if env is None else self._envs.index(env) for env in envs or [None] * count]
        self._env_of_row = torch.tensor(numbers, device=device)
        # If a later optimizer step is the first to see some rows, no weights score all rows.
        per_batch: Any = self._args.steps_per_generation
        if "old_per_token_logps" in batch or per_batch > self._args.gradient_accumulation_steps:
            self._rollouts.write_trained(batch, trainer)
        else:
            self._unwritten = batch

    def end(self, inputs: Mapping[str, Any], trainer: PolicyTrainer, checks_drift: bool) -> None:
        """Ends the pass over a micro-batch (b, t), before its backward pass. The last one of an optimizer
        step adds the metrics. Every rank must call it.

        checks_drift: False if the pass has dropout. Raises DriftError, on every rank alike.
        """
        assert self.logprobs is not None
        self._add(inputs, self.logprobs.float())
        self.logprobs = None
        if self._unwritten and self._seen is not None and bool(self._seen.all()):
            batch, self._unwritten = self._unwritten, None
            self._rollouts.write_trained(batch | {"old_per_token_logps": self._of_batch}, trainer)
            self._of_batch = None
        # Here and not after the backward pass, because DeepSpeed updates the weights within it.
        if trainer.accelerator.sync_gradients:
            self._finish(trainer, checks_drift)

    def _add(self, inputs: Mapping[str, Any], logprobs: torch.Tensor) -> None:
        mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        difference = logprobs.double() - inputs["sampling_per_token_logps"]
        ratios = difference.clamp(max=_MAX_DIFFERENCE).exp()
        weights = inputs.get("importance_sampling_ratio", ratios)
        cut, of = self._cut_off(inputs, ratios, mask)
        used = ratios[mask]
        sums = [*effective_sample(weights, mask), used.sum(), mask.sum(), cut.sum(), of.sum()]
        self._sums = self._sums.to(used.device) + torch.stack([one.double() for one in sums])
        self._max = torch.maximum(self._max.to(used.device), used.max()) if used.numel() else self._max
        if self._seen is None or self._env_of_row is None:
            return  # An earlier process began the batch.
        rows = inputs["row"]
        if self._of_batch is not None:
            self._of_batch[rows, : logprobs.size(1)] = logprobs
        self._seen[rows] = True
        self._add_drift(self._env_of_row[rows], difference, logprobs.double(), mask)

    def _add_drift(
        self, env_of_row: torch.Tensor, difference: torch.Tensor, logprobs: torch.Tensor, mask: torch.Tensor
    ) -> None:
        self._drift = self._drift.to(mask.device)
        columns = (mask.double(), difference.abs(), logprobs - difference, logprobs)
        # `where`, because a product with the mask would keep the NaN of a masked token.
        by_row = torch.stack([torch.where(mask, c, 0.0).sum(1) for c in columns], dim=1)
        known = env_of_row >= 0
        self._drift.index_add_(0, env_of_row[known], by_row[known])

    def _cut_off(
        self, inputs: Mapping[str, Any], ratios: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns which ratios the correction cuts off, and which it might: booleans (b, t) of tokens, or
        (b, 1) of rollouts."""
        weights, args = inputs.get("importance_sampling_ratio"), self._args
        if self._correction == "decoupled" and weights is not None:
            between = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * mask
            if weights.size(1) == 1 < mask.size(1):
                between, mask = between.sum(1, keepdim=True), mask.any(1, keepdim=True)
            return ~torch.isclose(weights, between.exp(), rtol=1e-4) & mask, mask
        if self._correction == "behavior":
            if args.importance_sampling_level == "sequence":
                total = torch.where(mask, ratios.log(), 0.0).sum(1, keepdim=True)
                ratios = (total / mask.sum(1, keepdim=True).clamp(min=1)).exp()
                mask = mask.any(1, keepdim=True)
            advantages = inputs["advantages"][:, None]
            upper = args.epsilon if args.epsilon_high is None else args.epsilon_high
            if args.loss_type == "cispo":
                return (ratios > upper) & (advantages > 0) & mask, mask
            if args.loss_type in _CLIPPED_ON_BOTH_SIDES:
                low = (ratios < 1 - args.epsilon) & (advantages < 0)
                return (low | ((ratios > 1 + upper) & (advantages > 0))) & mask, mask
        nothing = torch.zeros_like(mask)
        return nothing, nothing

    def _finish(self, trainer: PolicyTrainer, checks_drift: bool) -> None:
        own = torch.cat([self._sums, self._max[None].to(self._sums.device), self._drift.flatten()])
        self._reset()
        if self._env_of_row is not None:
            self._env_of_row.fill_(-1)  # After the update the weights are not those that sampled.
        ranks: Any = trainer.accelerator.gather(own.to(trainer.accelerator.device)[None])
        weight, squares, number, ratio, tokens, cut, of = ranks[:, :_NUM_SUMS].sum(0).tolist()
        if tokens:
            largest = ranks[:, _NUM_SUMS].max().item()
            trainer.add_metrics({"sampling/ratio_mean": ratio / tokens, "sampling/ratio_max": largest})
        if squares > 0:
            # Kish's effective sample size as a share: "Survey Sampling" (1965), section 11.7.
            trainer.add_metrics({"sampling/effective_sample_size": weight**2 / squares / number})
        if of:
            trainer.add_metrics({"sampling/clipped": cut / of})
        drift = ranks[:, _NUM_SUMS + 1 :].sum(0).view(-1, 4).tolist()
        tallies = {env: Tally(*row) for env, row in zip(self._envs, drift, strict=True) if row[0]}
        if not checks_drift or not tallies:
            return
        total = sum(tallies.values(), Tally())
        trainer.add_metrics({f"{env}/drift": of_env.drift for env, of_env in tallies.items()})
        trainer.add_metrics({"drift": total.drift})
        check_drift(tallies, self._config, trainer.state.global_step)
