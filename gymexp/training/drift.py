"""What trains the policy, checked at run time on some rollouts of every environment: numbers and draws.

Drift is the difference between the engine's log-probabilities of its own tokens and the trainer's. It shows
weights, templates or distributions that differ, and cannot show how tokens were drawn. For that, tokens are
compared with those drawn at the same place elsewhere: shared seeds make more of them equal than chance does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from gymexp.config.schema import RunConfig
from gymexp.errors import DrawError, DriftError
from gymexp.rollout.outcome import Failed, Outcome, Rollout, task_of
from gymexp.rollout.tokens import flatten

if TYPE_CHECKING:
    from gymexp.training.trainer import PolicyTrainer

NUM_ROWS = 8  # of each rank's part of a batch
# In nats, where rollout.max_drift is None. docs/results.md ("Drift") has what was measured.
MAX_DRIFT = {"float32": 0.001, "bfloat16": 0.02, "float16": 0.02}
_MOST_UNLIKELY = 1e-9
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, stay far apart


@dataclass(frozen=True)
class Row:
    """A rollout as the trainer's one sequence, with T completion tokens.

    sampled (T): where the policy spoke. logprobs (T): the engine's, in nats. elsewhere (T): the token that
    was drawn at the same place of the turn before or, in a first turn, of the group's rollout before; None
    where nothing was.
    """

    env: str
    prompt_ids: list[int]
    completion_ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    elsewhere: list[int | None]


@dataclass(frozen=True)
class Tally:
    """Sums over sampled tokens. repeats, expected, variance: of tokens that equal the one drawn elsewhere."""

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
        """Mean absolute difference of log-probabilities, in nats."""
        return self.difference / self.num_tokens


class Checks:
    """Compares engine and trainer, on a process's first batch and then every rollout.drift_every steps."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._began = False
        self._draws = Tally()  # over all comparisons so far

    def look(self, trainer: PolicyTrainer, outcomes: Sequence[Outcome]) -> None:
        """Called on every rank. outcomes: the rank's part of the batch. Raises DriftError, DrawError, on
        every rank alike."""
        step = trainer.state.global_step
        if self._began and step % self._config.rollout.drift_every:
            return
        self._began = True
        rows = choose_rows(outcomes, min(NUM_ROWS, len(outcomes)), trainer.pad_token_id)
        ids = [row.completion_ids for row in rows]
        elsewhere = [[-100 if token is None else token for token in row.elsewhere] for row in rows]
        found = tally(rows, score(trainer, rows, ids), score(trainer, rows, elsewhere))
        tallies = self._over_ranks(trainer, found)
        if not tallies:
            return
        whole = sum(tallies.values(), Tally())
        self._draws += whole
        trainer.add_metrics({f"{env}/drift": one.drift for env, one in tallies.items()})
        trainer.add_metrics(
            {"drift": whole.drift, "repeats/seen": whole.repeats, "repeats/expected": whole.expected}
        )
        check_drift(tallies, self._config, step)
        check_draws(self._draws)

    def _over_ranks(self, trainer: PolicyTrainer, found: Mapping[str, Tally]) -> dict[str, Tally]:
        accelerator, envs = trainer.accelerator, list(self._config.env)
        sums = torch.tensor([astuple(found.get(env, Tally())) for env in envs], dtype=torch.float64)
        whole: Any = accelerator.reduce(sums.to(accelerator.device), reduction="sum")
        tallies = {env: Tally(*row) for env, row in zip(envs, whole.tolist(), strict=True)}
        return {env: one for env, one in tallies.items() if one.num_tokens}


def score(trainer: PolicyTrainer, rows: Sequence[Row], labels: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The trainer's log-probabilities of `labels` at the places of each row's completion, on the CPU.
    labels: one for each completion token; -100 where none is asked for."""
    model: Any = trainer.model
    scores = []
    with torch.no_grad(), without_dropout(model):
        for row, wanted in zip(rows, labels, strict=True):
            ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]], device=trainer.accelerator.device)
            asked = torch.full_like(ids, -100)
            asked[0, len(row.prompt_ids) :] = torch.tensor(wanted)
            with trainer.accelerator.autocast():
                output = model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), labels=asked, fused_lm_head=True
                )
            scores.append(output.log_probs[0, -len(wanted) :].float().cpu())
    return scores


@contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """As the engine samples; afterwards the model trains or rests as before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def choose_rows(outcomes: Sequence[Outcome], num_rows: int, placeholder_id: int) -> list[Row]:
    """`num_rows` rollouts, as many of each environment as can be, spread over its tasks.

    outcomes: in the order of the batch, groups together. Where too few were played, rows of one placeholder
    that nobody sampled fill up: a pass through a sharded model is the work of all ranks, with as many rows on
    each.
    """
    by_env: dict[str, list[Row]] = {}
    for before, outcome in zip([None, *outcomes], outcomes, strict=False):
        if not isinstance(outcome, Failed):
            member = _played(before) if before and task_of(before).key == task_of(outcome).key else None
            by_env.setdefault(task_of(outcome).env, []).append(_row(outcome.rollout, member))
    spread = zip_longest(*(_spread(rows) for rows in by_env.values()))
    rows = [row for some in spread for row in some if row is not None][:num_rows]
    blank = Row("", [placeholder_id], [placeholder_id], [False], [0.0], [None])
    return rows + [blank] * (num_rows - len(rows))


def tally(
    rows: Sequence[Row], logprobs: Sequence[torch.Tensor], elsewhere: Sequence[torch.Tensor]
) -> dict[str, Tally]:
    """By environment. logprobs, elsewhere: the trainer's log-probabilities (T) of each row's tokens and, at
    the same places, of the row's `elsewhere`."""
    found: dict[str, Tally] = {}
    for row, ours, others in zip(rows, logprobs, elsewhere, strict=True):
        places = [i for i, sampled in enumerate(row.sampled) if sampled]
        if not places:
            continue
        theirs = torch.tensor(row.logprobs, dtype=torch.float64)[places]
        own = ours.double()[places]
        compared = [i for i in places if row.elsewhere[i] is not None]
        chance = others.double()[compared].exp().clamp(max=1.0)
        seen = Tally(
            len(places),
            (own - theirs).abs().sum().item(),
            theirs.sum().item(),
            own.sum().item(),
            sum(row.completion_ids[i] == row.elsewhere[i] for i in compared),
            chance.sum().item(),
            (chance * (1 - chance)).sum().item(),
        )
        found[row.env] = found.get(row.env, Tally()) + seen
    return found


def check_drift(tallies: Mapping[str, Tally], config: RunConfig, step: int) -> None:
    """Raises DriftError with both numbers for an environment whose tokens drift above rollout.max_drift."""
    bound = config.rollout.max_drift or MAX_DRIFT[config.model.dtype]
    for env, found in tallies.items():
        if not found.drift <= bound:
            count = int(found.num_tokens)
            raise DriftError(
                f"the engine's log-probabilities of its own tokens in env.{env} differ from the trainer's by "
                f"{found.drift:.4f} nats on average (engine {found.engine / count:.4f}, trainer "
                f"{found.trainer / count:.4f}, {count} tokens, step {step}); rollout.max_drift allows "
                f"{bound:g}. Do both hold the same weights, and is trainer.temperature the engine's?"
            )


def check_draws(found: Tally) -> None:
    """Raises DrawError where tokens repeat others more, or less, often than independent draws ever would.

    Given all that was drawn before it, an independent draw equals the token x with the probability that the
    policy gives x. So repeats less their expectation are a martingale with steps of at most 1, whose tails
    Freedman's inequality bounds: "On tail probabilities for martingales" (1975), theorem 1.6.
    """
    excess = found.repeats - found.expected
    if excess and -(excess**2) / (2 * (found.variance + abs(excess) / 3)) < math.log(_MOST_UNLIKELY):
        raise DrawError(
            f"{found.repeats:.0f} sampled tokens repeat the one drawn at the same place of the turn before, "
            f"or of another rollout of their task, where {found.expected:.1f} would by chance: the engine "
            "does not draw each token anew, so the rollouts are not the policy's. Does each sampling call "
            "have its own seed? A server of engine.urls must take the request's `seed`"
        )


def _row(rollout: Rollout, member: Rollout | None) -> Row:
    prompt_ids, completion_ids, mask, logprobs = flatten(rollout.turns)
    elsewhere: list[int | None] = [None] * len(completion_ids)
    at = 0
    before = member.turns[0].completion_ids if member else []
    for turn in rollout.turns:
        at = len(turn.prompt_ids) - len(prompt_ids)
        for place, token in enumerate(before[: len(turn.completion_ids)]):
            elsewhere[at + place] = token
        before = turn.completion_ids
    return Row(rollout.task.env, prompt_ids, completion_ids, [bool(one) for one in mask], logprobs, elsewhere)


def _played(outcome: Outcome) -> Rollout | None:
    return None if isinstance(outcome, Failed) else outcome.rollout


def _spread(rows: Sequence[Row]) -> list[Row]:
    """The same rows, so ordered that any first few lie far apart. Those with nothing to compare their draws
    with, as a group's first, come last."""
    far_apart = sorted(range(len(rows)), key=lambda i: i * _GOLDEN % 1)
    return sorted((rows[i] for i in far_apart), key=lambda row: all(token is None for token in row.elsewhere))
