"""The run-time check of what trains: rows of every environment, both numbers, and draws beside chance."""

from __future__ import annotations

import math
import random
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gymexp.config.schema import EnvConfig, ModelConfig, OverlapConfig, RolloutConfig, RunConfig
from gymexp.errors import DrawError, DriftError
from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Task, Truncated, Turn
from gymexp.training.drift import (
    Checks,
    Row,
    Tally,
    check_draws,
    check_drift,
    choose_rows,
    compared_envs,
    has_dropout,
    tally,
)
from gymexp.training.spans import Spans


def rollout(env: str, number: int, *turns: tuple[list[int], list[int]]) -> Rollout:
    task = Task(f"{env}/train/{number}", env, "a", {})
    return Rollout(task, [Turn(p, c, [-0.5 - i / 4 for i in range(len(c))]) for p, c in turns], 1.0, [])


def batch(*envs: str, groups: int = 4, members: int = 4) -> list[Outcome]:
    return [
        Completed(rollout(env, group, ([1, group], [member, 7, 8])))
        for group in range(groups)
        for env in envs
        for member in range(members)
    ]


def test_rows_come_from_every_environment_and_from_several_of_its_tasks():
    outcomes = batch("a", "b", "c") + batch("rare", groups=1, members=2)
    rows = choose_rows(outcomes, 8, 0, 0)
    counts = {env: sum(row.env == env for row in rows) for env in ("a", "b", "c", "rare")}
    assert len(rows) == 8
    assert set(counts.values()) == {2}
    for env in "abc":
        assert len({tuple(row.prompt_ids) for row in rows if row.env == env}) > 1


def test_failures_are_no_rows_and_missing_rows_are_filled_up():
    outcomes = [Failed(Task("a/train/0", "a", "a", {}), "timeout", "slow"), *batch("a", groups=1, members=2)]
    rows = choose_rows(outcomes, 3, 9, 0)
    assert [row.env for row in rows] == ["a", "a", ""]
    assert rows[-1] == Row("", [9], [9], [False], [0.0], [None])
    nothing = [torch.zeros(len(row.completion_ids)) for row in rows]
    assert set(tally(rows, nothing, nothing)) == {"a"}


def test_a_truncated_rollout_is_compared_as_any_other():
    cut = Truncated(rollout("a", 0, ([1], [2, 3])), "length")
    assert choose_rows([cut], 1, 0, 0)[0].completion_ids == [2, 3]


def test_a_token_is_compared_with_the_turn_before_and_in_a_first_turn_with_the_groups_rollout_before():
    first = rollout("a", 0, ([1, 1], [11, 12, 13]))
    second = rollout(
        "a",
        0,
        ([1, 1], [21, 22]),
        ([1, 1, 21, 22, 50, 51], [31, 32, 33]),
        ([1, 1, 21, 22, 50, 51, 31, 32, 33, 52], [41]),
    )
    other_task = rollout("a", 1, ([2], [61]))
    rows = choose_rows([Completed(first), Completed(second), Completed(other_task)], 3, 0, 0)
    [row] = [row for row in rows if 21 in row.completion_ids]
    assert row.completion_ids == [21, 22, 50, 51, 31, 32, 33, 52, 41]
    assert row.sampled == [True, True, False, False, True, True, True, False, True]
    assert row.counterparts == [11, 12, None, None, 21, 22, None, None, 31]
    assert rows[0] is row, "rows with nothing to compare come last"
    assert sum(token is not None for other in rows[1:] for token in other.counterparts) == 0


def versioned(number: int, prompt: list[int], ids: list[int], *versions: tuple[int, int]) -> Rollout:
    played = rollout("a", number, (prompt, ids))
    return replace(played, turns=[replace(played.turns[0], versions=list(versions))])


def test_only_what_the_current_weights_sampled_is_checked_and_a_piece_is_compared_with_the_one_before():
    cut = versioned(0, [1], [11, 12, 13, 14, 15, 16], (3, 2), (4, 1), (5, 3))
    old, new = versioned(1, [2], [21, 22], (4, 2)), versioned(2, [3], [31], (5, 1))
    outcomes = [Completed(one) for one in (old, cut, new)]
    rows = choose_rows(outcomes, 3, 0, 5)
    assert [row.completion_ids for row in rows[:2]] == [[11, 12, 13, 14, 15, 16], [31]], "none of the old one"
    assert rows[0].sampled == [False, False, False, True, True, True]
    assert rows[0].counterparts == [None, None, 11, 13, None, None]
    assert rows[2].sampled == [False], "a blank row, as every rank needs as many"
    assert [any(row.sampled) for row in choose_rows(outcomes, 3, 0, 6)] == [False] * 3


def test_pieces_that_share_a_seed_would_show():
    """The draws of a piece would be those of the piece before."""
    rng = random.Random(0)
    draws = Tally()
    for number in range(20):
        ids = [rng.randrange(50) for _ in range(10)]
        [row] = choose_rows([Completed(versioned(number, [1], ids + ids, (1, 10), (2, 10)))], 1, 0, 2)
        chance = torch.full((20,), math.log(1 / 50))
        draws += tally([row], [chance], [chance])["a"]
    assert (draws.repeats, draws.expected) == (200, pytest.approx(4.0))
    with pytest.raises(DrawError):
        check_draws(draws)


def test_tallies_are_sums_over_what_was_sampled():
    row = Row("a", [1], [5, 6, 7], [True, False, True], [-1.0, 0.0, -2.0], [5, None, 9])
    ours = torch.tensor([-1.5, -9.0, -1.75])
    chance = torch.tensor([0.25, 0.9, 0.5]).log()
    found = tally([row, row], [ours, ours], [chance, chance])["a"]
    assert found.num_tokens == 4 and found.drift == pytest.approx((0.5 + 0.25) / 2)
    assert (found.engine, found.trainer) == (pytest.approx(-6.0), pytest.approx(-6.5))
    assert (found.repeats, found.expected) == (2, pytest.approx(1.5))
    assert found.variance == pytest.approx(2 * (0.25 * 0.75 + 0.25))


def config(dtype: str = "bfloat16", max_drift: float | None = None) -> RunConfig:
    env = {"sudoku": EnvConfig(config_path="c", agent="a")}
    model = ModelConfig("m", "p", dtype=dtype)
    return RunConfig(model=model, env=env, rollout=RolloutConfig(max_drift=max_drift))


@pytest.mark.parametrize(
    ("dtype", "max_drift", "drift", "ends"),
    [
        ("bfloat16", None, 0.01, False),
        ("bfloat16", None, 0.03, True),
        ("float32", None, 0.0005, False),
        ("float32", None, 0.002, True),
        ("float32", 0.05, 0.01, False),
        ("bfloat16", 0.001, 0.01, True),
        ("bfloat16", None, math.nan, True),
    ],
)
def test_drift_of_one_environment_ends_the_run_with_both_numbers(dtype, max_drift, drift, ends):
    tallies = {
        "workplace": Tally(100, 0.0, -50.0, -50.0),
        "sudoku": Tally(10, 10 * drift, -5.0, -5.0 - drift),
    }
    if not ends:
        return check_drift(tallies, config(dtype, max_drift), 7)
    with pytest.raises(
        DriftError, match=r"env\.sudoku differ .* \(engine -0\.5000, trainer .*10 tokens, step 7"
    ):
        check_drift(tallies, config(dtype, max_drift), 7)


def coins(shared: bool, positions: int, generator: random.Random) -> Tally:
    """Draws of two generations from like distributions, by one uniform or by two."""
    found = Tally()
    for _ in range(positions):
        p = generator.betavariate(0.3, 0.3)
        first = generator.random()
        second = first if shared else generator.random()
        drawn, elsewhere = second < p, first < p
        chance = p if elsewhere else 1 - p
        found += Tally(1, 0, 0, 0, drawn == elsewhere, chance, chance * (1 - chance))
    return found


def test_independent_draws_pass_however_long_the_run():
    generator = random.Random(0)
    for _ in range(20):
        found = Tally()
        for _ in range(50):
            found += coins(False, 40, generator)
            check_draws(found)


def test_draws_with_a_shared_seed_end_the_run():
    generator = random.Random(0)
    found = Tally()
    with pytest.raises(DrawError, match="repeat the one drawn at the same place of the turn before"):
        for _ in range(20):
            found += coins(True, 20, generator)
            check_draws(found)
    assert found.num_tokens <= 300


def test_one_unlikely_repeat_is_no_proof():
    check_draws(Tally(1, 0, 0, 0, 1, 1e-6, 1e-6))
    check_draws(Tally())


class Model(torch.nn.Module):
    """Gives every label the same log-probability; notes whether it was asked in training mode."""

    def __init__(self, logprob: float) -> None:
        super().__init__()
        self.logprob = logprob
        self.attention_dropout = 0.0
        self.modes: set[bool] = set()

    def forward(self, input_ids: Any, labels: Any, **_: Any) -> Any:
        self.modes.add(self.training)
        return SimpleNamespace(log_probs=torch.full_like(labels, self.logprob, dtype=torch.float32))


def rank(logprob: float, other: Tally, step: int = 0) -> Any:
    """A trainer on one of two ranks; other: what the other one has found in "sudoku"."""

    def reduce(sums: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return sums + torch.tensor([vars(other)[name] for name in vars(other)], dtype=torch.float64)

    accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext, reduce=reduce)
    metrics: dict[str, float] = {}
    return SimpleNamespace(
        model=Model(logprob).train(),
        accelerator=accelerator,
        state=SimpleNamespace(global_step=step),
        pad_token_id=0,
        metrics=metrics,
        add_metrics=metrics.update,
    )


def sudoku() -> list[Outcome]:
    """Two rollouts of two tokens each, with log-probabilities -0.5 and -0.75; none repeats the other."""
    return [Completed(rollout("sudoku", 0, ([1], [member, 9 + member]))) for member in (2, 3)]


def test_numbers_are_those_of_all_ranks_and_the_model_is_asked_without_dropout():
    trainer = rank(-0.5, Tally(num_tokens=6, difference=0.1, repeats=3, expected=1.25, variance=1))
    trainer.model.attention_dropout = 0.1
    Checks(config(max_drift=0.5)).check(trainer, sudoku())
    # Here: four tokens, differences of 0, 0.25, 0 and 0.25; two may repeat, each with probability e^-0.5.
    assert trainer.metrics["drift"] == trainer.metrics["sudoku/drift"] == pytest.approx((0.5 + 0.1) / 10)
    assert trainer.metrics["repeats/seen"] == 3
    assert trainer.metrics["repeats/expected"] == pytest.approx(2 * math.exp(-0.5) + 1.25)
    assert trainer.model.modes == {False} and trainer.model.training


def test_another_ranks_drift_and_draws_end_the_run_here_too():
    drifting = rank(-0.5, Tally(num_tokens=100, difference=30.0))
    drifting.model.attention_dropout = 0.1
    with pytest.raises(DriftError, match=r"env\.sudoku"):
        Checks(config()).check(drifting, sudoku())
    repeating = rank(-0.5, Tally(num_tokens=200, repeats=200, expected=20, variance=18))
    with pytest.raises(DrawError):
        Checks(config(max_drift=1.0)).check(repeating, sudoku())


def test_without_dropout_the_training_pass_shows_the_drift_and_the_check_asks_for_draws_alone():
    trainer = rank(-0.9, Tally(num_tokens=100, difference=30.0))
    Checks(config()).check(trainer, sudoku())
    assert trainer.metrics.keys() == {"repeats/seen", "repeats/expected"}


@pytest.mark.parametrize(
    ("layer", "drops"),
    [
        (torch.nn.Dropout(0.1), True),
        (torch.nn.Dropout(0.0), False),
        (torch.nn.LayerNorm(2, eps=0.1), False),
        (torch.nn.MultiheadAttention(2, 1, dropout=0.1), True),
    ],
    ids=str,
)
def test_dropout_is_found_in_modules_and_in_numbers_that_attention_reads(layer, drops):
    assert has_dropout(torch.nn.Sequential(layer)) == drops


def test_only_rollouts_of_the_current_weights_are_compared():
    task, turns = Task("t", "sudoku", "a", {}), [Turn([1], [2], [-0.5])]
    played = [Completed(Rollout(task, turns, 1.0, [], weights_version=v)) for v in (None, 3, 2)]
    assert compared_envs([*played, Failed(task, "timeout", "")], 3) == ["sudoku", "sudoku", None, None]


def test_batches_are_compared_at_the_start_wherever_it_is_and_then_every_so_many_steps():
    checks = Checks(config(max_drift=1.0))
    compared = []
    for step in (7, 8, 19, 20, 21, 40):
        trainer = rank(-0.5, Tally(), step)
        checks.check(trainer, sudoku())
        if trainer.metrics:
            compared.append(step)
    assert compared == [7, 20, 40]


def test_a_check_that_is_due_waits_for_tokens_of_the_current_weights():
    checks = Checks(config(max_drift=1.0))
    compared = []
    for step, version in ((20, 19), (21, 20), (22, 22), (23, 23), (40, 39), (41, 41)):
        of_version = [Completed(versioned(0, [1], [2, 3], (version, 2)))]
        trainer = rank(-0.5, Tally(), step)
        checks.check(trainer, [replace(one, rollout=in_sudoku(one.rollout)) for one in of_version])
        if trainer.metrics:
            compared.append(step)
    assert compared == [22, 41]


@pytest.mark.parametrize("deepspeed", [False, True])
def test_a_check_that_the_batch_left_due_takes_what_landed_before_the_weights_change(deepspeed):
    checks = Checks(replace(config(max_drift=0.2), overlap=OverlapConfig(max_staleness=1)))
    old, new = (
        [Completed(in_sudoku(versioned(0, [1], ids, (version, 2))))]
        for ids, version in (([2, 3], 4), ([5, 6], 5))
    )
    trainer = rank(-0.5, Tally(), step=5)
    trainer.is_deepspeed_enabled = deepspeed
    spans: list[dict[str, Any]] = []
    trainer.spans = Spans()
    trainer.spans.report = spans.append
    trainer.accelerator.num_processes, trainer.accelerator.process_index = 1, 0
    asked: list[int] = []

    def landed_later(step: int) -> list[Completed]:
        asked.append(step)
        time.sleep(0.2)
        return [*old, *new]

    trainer.batch_tasks = SimpleNamespace(landed=landed_later)
    checks.check(trainer, old)
    assert not trainer.metrics
    trainer.accelerator.sync_gradients = False  # not the last micro-batch
    for in_backward in (True, False):
        assert checks.before_update(trainer, in_backward) == 0
    assert not asked
    trainer.accelerator.sync_gradients = True
    checks.before_update(trainer, in_backward=not deepspeed)
    assert not asked
    trainer.model.modes.clear()
    landed, trainer.batch_tasks = trainer.batch_tasks, SimpleNamespace(landed=lambda step: old)
    checks.before_update(trainer, in_backward=deepspeed)
    assert not trainer.model.modes, "nothing is new, so there is no pass"
    trainer.batch_tasks = landed
    spans.clear()
    waited = checks.before_update(trainer, in_backward=deepspeed)
    [in_rollout] = [span["seconds"] for span in spans if span["span"] == "rollout"]
    assert waited == pytest.approx(in_rollout, abs=0.05) and waited >= 0.2, "that is no pass, but a wait"
    # The new one has two tokens, with differences of 0 and 0.25.
    assert asked == [5] and trainer.metrics["drift"] == pytest.approx(0.125)
    checks.before_update(trainer, in_backward=deepspeed)
    assert asked == [5], "it is done"


def in_sudoku(played: Rollout) -> Rollout:
    return replace(played, task=Task("sudoku/train/0", "sudoku", "a", {}))
