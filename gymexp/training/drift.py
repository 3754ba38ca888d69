"""The run-time checks of the training data: drift and draws.

Drift is the difference between the engine's and the trainer's log-probabilities of the sampled tokens. It
shows that weights, templates or distributions differ, but not how the tokens were drawn. The training pass
shows it at every step (`gymexp.training.training_pass`). To check the draws, on some rollouts of every
environment, each token is compared with a counterpart: a token that was drawn at the same position of another
turn or rollout. Draws with a shared seed equal their counterparts more often than chance allows.

Both need the policy's probability of a token under the weights that sampled it. So with `overlap` only tokens
are checked that the trainer's current weights sampled: draws of a rollout that updates cut after its last
cut, and drift of rollouts that no update met.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from gymexp.config.schema import RunConfig
from gymexp.errors import DrawError, DriftError
from gymexp.rollout.outcome import Failed, Outcome, Rollout, task_of
from gymexp.rollout.tokens import flatten, token_versions
from gymexp.training.ranks import on_main_rank

if TYPE_CHECKING:
    from gymexp.training.trainer import PolicyTrainer

NUM_ROWS = 8  # rollouts that are checked of each rank's part of a batch
# Bound by model.dtype, in nats, for rollout.max_drift=None. docs/results.md ("Drift") has the measurements.
MAX_DRIFT = {"float32": 0.001, "bfloat16": 0.02, "float16": 0.02}
_MIN_PROBABILITY = 1e-9  # Draws that are less probable end the run.
_GOLDEN = (math.sqrt(5) - 1) / 2  # Its multiples, modulo 1, are spread evenly.


@dataclass(frozen=True)
class Row:
    """A rollout as the one sequence that the trainer sees, with T completion tokens.

    sampled (T): True for tokens that the policy sampled with its current weights. logprobs (T): the engine's
    log-probabilities, in nats. counterparts (T): the token that was drawn at the same position of the
    previous turn or, in the first turn, of the previous rollout in the group; behind a cut, the one at the
    same position of the piece before. None if there is no such token.
    """

    env: str
    prompt_ids: list[int]
    completion_ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    counterparts: list[int | None]


@dataclass(frozen=True)
class Tally:
    """Sums over sampled tokens.

    difference: absolute difference of the log-probabilities, in nats. engine, trainer: log-probabilities, in
    nats. repeats: number of tokens that equal their counterpart. expected, variance: of that number, if the
    draws are independent.
    """

    num_tokens: float = 0.0
    difference: float = 0.0
    engine: float = 0.0
    trainer: float = 0.0
    repeats: float = 0.0
    expected: float = 0.0
    variance: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def drift(self) -> float:
        """The mean absolute difference of log-probabilities, in nats."""
        return self.difference / self.num_tokens


class Checks:
    """Checks the draws of the first batch of a process, and then of every step that is a multiple of
    rollout.drift_every. Checks the drift on the same rollouts where the training pass cannot show it: it has
    dropout, with which no engine samples, or updates have met all rollouts (`overlap`).

    If the current weights sampled no token of a batch, because the trainer sets the pace, rollouts are
    checked that have landed for a later batch, before the weights change.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._is_due = True
        self._draws = Tally()  # over all checks of this process
        self._has_dropout: bool | None = None

    def has_dropout(self, model: torch.nn.Module) -> bool:
        """Returns whether the model drops out anything in training. Looks at it once."""
        if self._has_dropout is None:
            self._has_dropout = has_dropout(model)
        return self._has_dropout

    def check(self, trainer: PolicyTrainer, outcomes: Sequence[Outcome]) -> None:
        """Checks some rollouts if a check is due, and adds the metrics. Every rank must call it.

        outcomes: this rank's part of the batch. Raises DriftError or DrawError, on every rank alike.
        """
        step = trainer.state.global_step
        self._is_due |= step % self._config.rollout.drift_every == 0
        if self._is_due:
            rows = choose_rows(outcomes, min(NUM_ROWS, len(outcomes)), trainer.pad_token_id, step)
            self._check(trainer, rows)

    def before_update(self, trainer: PolicyTrainer, in_backward: bool) -> float:
        """Checks rollouts that have landed for a later batch, if a check is still due before the last pass of
        a step. Every rank must call it before each pass and after it. Returns the seconds in which it waited
        for a rollout to land.

        in_backward: whether the weights may change in what follows at once. Only DeepSpeed changes them in
        the backward pass; otherwise there is time until after it, and more rollouts have landed.
        """
        accelerator, step = trainer.accelerator, trainer.state.global_step
        changes_now = in_backward == bool(trainer.is_deepspeed_enabled)
        if not (self._is_due and changes_now and accelerator.sync_gradients):
            return 0.0
        num_ranks = accelerator.num_processes

        def choose() -> list[Row]:
            landed = trainer.batch_tasks.landed(step)
            return choose_rows(landed, NUM_ROWS * num_ranks, trainer.pad_token_id, step)

        with trainer.spans.phase("logprobs", step + 1):
            began = time.monotonic()
            with trainer.spans.phase("rollout", step + 1):
                rows = on_main_rank(accelerator, choose)
            waited = time.monotonic() - began
            if any(any(row.sampled) for row in rows):
                self._check(trainer, rows[accelerator.process_index :: num_ranks])
        return waited

    def _check(self, trainer: PolicyTrainer, rows: Sequence[Row]) -> None:
        """Checks this rank's rows. Every rank must have the same number."""
        step = trainer.state.global_step
        ids = [row.completion_ids for row in rows]
        counterparts = [[-100 if token is None else token for token in row.counterparts] for row in rows]
        model: Any = trainer.model
        checks_drift = self.has_dropout(model) or self._config.overlap.max_staleness > 0
        logprobs = score(trainer, rows, ids) if checks_drift else [torch.tensor(r.logprobs) for r in rows]
        own = tally(rows, logprobs, score(trainer, rows, counterparts))
        tallies = self._sum_over_ranks(trainer, own)
        if not tallies:
            return
        self._is_due = False
        total = sum(tallies.values(), Tally())
        self._draws += total
        trainer.add_metrics({"repeats/seen": total.repeats, "repeats/expected": total.expected})
        if checks_drift:
            trainer.add_metrics({f"{env}/drift": of_env.drift for env, of_env in tallies.items()})
            trainer.add_metrics({"drift": total.drift})
            check_drift(tallies, self._config, step)
        check_draws(self._draws)

    def _sum_over_ranks(self, trainer: PolicyTrainer, own: Mapping[str, Tally]) -> dict[str, Tally]:
        """Returns the sums over all ranks by environment, without environments that have no sampled token."""
        accelerator, envs = trainer.accelerator, list(self._config.env)
        sums = torch.tensor([astuple(own.get(env, Tally())) for env in envs], dtype=torch.float64)
        totals: Any = accelerator.reduce(sums.to(accelerator.device), reduction="sum")
        tallies = {env: Tally(*row) for env, row in zip(envs, totals.tolist(), strict=True)}
        return {env: of_env for env, of_env in tallies.items() if of_env.num_tokens}


def score(trainer: PolicyTrainer, rows: Sequence[Row], labels: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Returns the trainer's log-probabilities of `labels` at the positions of each row's completion tokens,
    on the CPU.

    labels: a token for each completion token of each row; -100 where no log-probability is needed.
    """
    model: Any = trainer.model
    scores = []
    with torch.no_grad(), without_dropout(model):
        for row, row_labels in zip(rows, labels, strict=True):
            ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]], device=trainer.accelerator.device)
            all_labels = torch.full_like(ids, -100)
            all_labels[0, len(row.prompt_ids) :] = torch.tensor(row_labels)
            with trainer.accelerator.autocast():
                output = model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), labels=all_labels, fused_lm_head=True
                )
            scores.append(output.log_probs[0, -len(row_labels) :].float().cpu())
    return scores


def compared_envs(outcomes: Sequence[Outcome], step: int) -> list[str | None]:
    """Returns the environment of each rollout that the weights of `step` sampled, and None for the others,
    whose log-probabilities may differ from the trainer's."""
    return [
        outcome.rollout.task.env
        if not isinstance(outcome, Failed) and outcome.rollout.weights_version in (None, step)
        else None
        for outcome in outcomes
    ]


def has_dropout(model: torch.nn.Module) -> bool:
    """Returns whether a module has a probability of dropout above 0: as torch's own modules do, or as a
    number that its forward pass reads, which transformers' attention does."""
    return any(
        isinstance(value, float) and value > 0 and ("drop" in name or isinstance(module, torch.nn.Dropout))
        for module in model.modules()
        for name, value in vars(module).items()
    )


@contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Switches dropout off within the block, as the engine samples without it, then restores the mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def choose_rows(outcomes: Sequence[Outcome], num_rows: int, placeholder_id: int, version: int) -> list[Row]:
    """Returns `num_rows` rollouts with tokens that weights of `version`, or of an unknown one, sampled. They
    are spread evenly over the environments and over each environment's tasks.

    outcomes: in the order of the batch, with groups together. If there are too few rollouts, blank rows of
    one placeholder token, which counts as not sampled, fill up: a pass through a sharded model needs all
    ranks, and every rank must have the same number of rows.
    """
    by_env: dict[str, list[Row]] = {}
    for previous, outcome in zip([None, *outcomes], outcomes, strict=False):
        if not isinstance(outcome, Failed):
            member = (
                _rollout_of(previous) if previous and task_of(previous).key == task_of(outcome).key else None
            )
            row = _row(outcome.rollout, member, version)
            if any(row.sampled):
                by_env.setdefault(task_of(outcome).env, []).append(row)
    rounds = zip_longest(*(_spread(rows) for rows in by_env.values()))
    rows = [row for one_of_each in rounds for row in one_of_each if row is not None][:num_rows]
    blank = Row("", [placeholder_id], [placeholder_id], [False], [0.0], [None])
    return rows + [blank] * (num_rows - len(rows))


def tally(
    rows: Sequence[Row], logprobs: Sequence[torch.Tensor], counterpart_logprobs: Sequence[torch.Tensor]
) -> dict[str, Tally]:
    """Returns the sums over the rows' sampled tokens, by environment.

    logprobs: the trainer's log-probabilities (T) of each row's tokens, in nats. counterpart_logprobs: those
    of each row's counterparts, at the same positions.
    """
    tallies: dict[str, Tally] = {}
    for row, row_logprobs, row_counterparts in zip(rows, logprobs, counterpart_logprobs, strict=True):
        positions = [i for i, sampled in enumerate(row.sampled) if sampled]
        if not positions:
            continue
        engine = torch.tensor(row.logprobs, dtype=torch.float64)[positions]
        trainer = row_logprobs.double()[positions]
        compared = [i for i in positions if row.counterparts[i] is not None]
        chance = row_counterparts.double()[compared].exp().clamp(max=1.0)
        of_row = Tally(
            len(positions),
            (trainer - engine).abs().sum().item(),
            engine.sum().item(),
            trainer.sum().item(),
            sum(row.completion_ids[i] == row.counterparts[i] for i in compared),
            chance.sum().item(),
            (chance * (1 - chance)).sum().item(),
        )
        tallies[row.env] = tallies.get(row.env, Tally()) + of_row
    return tallies


def check_drift(tallies: Mapping[str, Tally], config: RunConfig, step: int) -> None:
    """Raises DriftError with both mean log-probabilities for an environment whose drift is above
    rollout.max_drift, or is NaN."""
    bound = config.rollout.max_drift or MAX_DRIFT[config.model.dtype]
    for env, of_env in tallies.items():
        if not of_env.drift <= bound:
            count = int(of_env.num_tokens)
            raise DriftError(
                f"the engine's log-probabilities of its own tokens in env.{env} differ from the trainer's by "
                f"{of_env.drift:.4f} nats on average (engine {of_env.engine / count:.4f}, trainer "
                f"{of_env.trainer / count:.4f}, {count} tokens, step {step}); rollout.max_drift allows "
                f"{bound:g}. Do both hold the same weights, and is trainer.temperature the engine's?"
            )


def check_draws(draws: Tally) -> None:
    """Raises DrawError if tokens equal their counterparts so often, or so rarely, that the probability is
    below `_MIN_PROBABILITY` for independent draws.

    Given all earlier draws, an independent draw equals its counterpart x with the probability that the policy
    gives x. So the repeats minus their expectation are a martingale with steps of at most 1. Freedman's
    inequality bounds its tails: "On tail probabilities for martingales" (1975), theorem 1.6.
    """
    excess = draws.repeats - draws.expected
    if excess and -(excess**2) / (2 * (draws.variance + abs(excess) / 3)) < math.log(_MIN_PROBABILITY):
        raise DrawError(
            f"{draws.repeats:.0f} sampled tokens repeat the one drawn at the same place of the turn before, "
            f"or of another rollout of their task, where {draws.expected:.1f} would by chance: the engine "
            "does not draw each token anew, so the rollouts are not the policy's. Does each sampling call "
            "have its own seed? A server of engine.urls must take the request's `seed`"
        )


def _row(rollout: Rollout, member: Rollout | None, version: int) -> Row:
    """Returns a rollout as a row. member: the previous rollout of its group, if that was played. version: of
    the policy's current weights."""
    prompt_ids, completion_ids, mask, logprobs = flatten(rollout.turns)
    counterparts: list[int | None] = [None] * len(completion_ids)
    previous = member.turns[0].completion_ids if member else []
    for turn in rollout.turns:
        start = len(turn.prompt_ids) - len(prompt_ids)
        end = len(turn.completion_ids)
        for _, count in turn.versions or [(version, end)]:
            for position, token in enumerate(previous[:count]):
                counterparts[start + position] = token
            previous = completion_ids[start : start + count]
            start += count
        previous = turn.completion_ids
    versions = token_versions(rollout.turns)
    sampled = [
        bool(flag) and of_token in (None, version) for flag, of_token in zip(mask, versions, strict=True)
    ]
    return Row(rollout.task.env, prompt_ids, completion_ids, sampled, logprobs, counterparts)


def _rollout_of(outcome: Outcome) -> Rollout | None:
    return None if isinstance(outcome, Failed) else outcome.rollout


def _spread(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows in an order in which the first few are far apart in the batch. Rows without any
    counterpart, such as a group's first rollout, come last."""
    far_apart = sorted(range(len(rows)), key=lambda i: i * _GOLDEN % 1)
    return sorted((rows[i] for i in far_apart), key=lambda row: all(t is None for t in row.counterparts))
