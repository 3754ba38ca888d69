"""Whole runs whose rollouts are played ahead of training, or again for groups of equal rewards."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from whole_run import BATCH, UNEVALUATED

from gymexp.rollout.rollout_files import read_index

GENERATIONS = 4
STEPS = 6
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
LENGTH = f"trainer.max_steps={STEPS}"


def tasks_in_order(run) -> list[str]:
    """The tasks of the first epoch, as the data have them."""
    lines = (run.directory / "data" / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["key"] for line in lines]


def trained(run) -> list[str]:
    """The task of each group, in the order of training."""
    return [key for step in range(1, STEPS + 1) for key in run.task_keys(step)[::GENERATIONS]]


def spans(line: dict) -> list[list[list[int]]]:
    return [turn["versions"] for turn in line["rollout"]["turns"]]


def ages_of_rollouts(run) -> set[int]:
    """The ages of the rollouts' oldest tokens, in steps, when they were trained."""
    rows = [row for row in read_index(run.directory / "rollouts") if row["file"].startswith("step-")]
    return {int(row["file"][5:]) - 1 - row["weights_version"] for row in rows if row["outcome"] != "failed"}


def test_rollouts_go_on_over_updates_within_the_bound_and_evaluations_have_the_weights_of_their_step(started):
    run = started("ahead", LENGTH, "overlap.max_staleness=3", "evaluation.every_steps=3")
    assert run.ended_cleanly() == 0, run.said
    ages, num_cut = Counter(), 0
    for step in range(1, STEPS + 1):
        for line in run.rollouts(f"step-{step:06d}"):
            if line["outcome"] == "failed":
                continue
            for turn, of_turn in zip(line["rollout"]["turns"], spans(line), strict=True):
                assert sum(count for _, count in of_turn) == len(turn["completion_ids"])
                num_cut += len(of_turn) > 1
                for version, count in of_turn:
                    ages[step - 1 - version] += count
    assert 0 <= min(ages) < max(ages) <= 3
    entries = [entry for entry in run.metrics() if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    assert sum(entry["overlap/turns_cut"] for entry in entries) == num_cut > 0
    assert entries[0]["staleness/max"] == 0 and entries[0]["drift"] < 0.001
    assert all(entry["repeats/expected"] > 0 for entry in entries if "repeats/expected" in entry)
    for entry in entries:
        parts = ("rollout", "sync", "logprobs", "update", "evaluation", "other")
        assert sum(entry[f"time/{part}"] for part in parts) == pytest.approx(entry["time/step"], abs=0.01)
        assert 0 <= entry["idle/engine"] <= 1 and 0 <= entry["idle/trainer"] < 1
        assert 0 <= entry["engine/in_flight"] <= 4 * BATCH
    # Nothing may be left to play in the last step.
    assert all(entry["idle/engine"] < 1 and entry["engine/in_flight"] > 0 for entry in entries[:-1])
    for step in (0, 3, STEPS):
        played = run.rollouts(f"eval-{step:06d}")
        versions = {version for line in played for turn in spans(line) for version, _ in turn}
        assert versions == {step}
    # Every group that was started is trained, in whatever order: the first 24 of the order.
    keys = trained(run)
    assert Counter(keys) == Counter(tasks_in_order(run)[: len(keys)])
    assert len(keys) == STEPS * BATCH // GENERATIONS


def test_a_run_that_is_killed_and_resumed_trains_the_tasks_in_order_each_once(started):
    exact = ["overlap.max_staleness=2", "overlap.lead=2", "overlap.order=exact", "overlap.update=wait"]
    run = started("killed", LENGTH, *exact, *UNEVALUATED)
    run.wait_for_step(3)
    run.process.kill()
    run.process.wait()
    again = started("killed", resume=True)
    assert again.ended_cleanly() == 0, again.said
    assert again.steps() == list(range(1, STEPS + 1))
    keys = trained(again)
    assert keys == tasks_in_order(again)[: len(keys)]
    ages = ages_of_rollouts(again)
    assert ages <= {0, 1, 2} and len(ages) > 1


def test_a_run_that_is_asked_to_end_twice_goes_on_and_trains_each_task_once(started):
    run = started("asked", LENGTH, "overlap.max_staleness=2", *UNEVALUATED)
    for step in (1, 3):
        run.wait_for_step(step)
        run.process.send_signal(signal.SIGTERM)
        run.ended_cleanly()
        assert f"resume={run.directory}" in run.said.replace("'", ""), run.said
        run = started("asked", resume=True)
    assert run.ended_cleanly() == 0, run.said
    keys = trained(run)
    assert Counter(keys) == Counter(tasks_in_order(run)[: len(keys)])


def test_an_engine_that_is_killed_while_the_trainer_trains_comes_back_and_nothing_is_lost(started):
    run = started("lost", LENGTH, "overlap.max_staleness=3", *UNEVALUATED)
    for step in (1, 3):
        run.wait_for_step(step)
        run.server("hf-0").kill()
    assert run.ended_cleanly() == 0, run.said
    assert run.log("trainer").count("is back, with the weights of step") == 2
    keys = trained(run)
    assert Counter(keys) == Counter(tasks_in_order(run)[: len(keys)])
    ages = {
        step - 1 - version
        for step in range(1, STEPS + 1)
        for line in run.rollouts(f"step-{step:06d}")
        for turn in spans(line)
        for version, _ in turn
    }
    assert 0 <= min(ages) < max(ages) <= 3
    drifts = [entry["drift"] for entry in run.metrics() if "drift" in entry]
    assert drifts and max(drifts) < 0.001


@pytest.mark.ranks
@pytest.mark.parametrize("spread", [[], ["trainer.fsdp=true"]], ids=["whole", "fsdp"])
def test_two_ranks_train_the_batches_of_one_though_their_engine_is_killed(started, monkeypatch, spread):
    """The placement takes these names for GPUs; torch, which is for CPUs here, knows of none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    if spread:
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "sharded_run"), prepend=os.pathsep)
    exact = ["overlap.max_staleness=2", "overlap.lead=2", "overlap.order=exact"]
    apart = ["engine=hf", "placement.rollout_gpus=1", "placement.train_gpus=2"]
    batch = [f"trainer.per_device_train_batch_size={BATCH // 4}", "trainer.gradient_accumulation_steps=2"]
    run = started(f"ranks{len(spread)}", LENGTH, *exact, *apart, *batch, *spread, *UNEVALUATED)
    for step in (1, 3):
        run.wait_for_step(step)
        run.server("hf-0").kill()
    assert run.ended_cleanly() == 0, run.said
    assert run.log("trainer").count("is back, with the weights of step") == 2
    keys = trained(run)
    assert keys == tasks_in_order(run)[: len(keys)] and len(keys) == STEPS * BATCH // GENERATIONS
    ages = ages_of_rollouts(run)
    assert ages <= {0, 1, 2} and len(ages) > 1
    drifts = [entry["drift"] for entry in run.metrics() if "drift" in entry]
    assert drifts and max(drifts) < 0.001


def test_a_run_whose_groups_all_have_equal_rewards_ends_and_names_the_environment(started):
    """Draws that are all but greedy make the rollouts of a group equal."""
    dynamic = ["rollout.dynamic_sampling=true", "rollout.max_resampled=2", "trainer.temperature=0.01"]
    run = started("flat", "env=[sudoku]", *dynamic, *UNEVALUATED)
    assert run.ended_cleanly() == 1, run.said
    assert "rollout.dynamic_sampling left out 9 groups in a row" in run.said
    assert "of env.sudoku" in run.said and "rollout.max_resampled=2" in run.said
    left_out = [row for row in read_index(run.directory / "rollouts") if row["file"] == "filtered-000001"]
    num_kept, rest = divmod(len(left_out), GENERATIONS)
    assert num_kept >= 9 and not rest, "they are kept, also those that landed while the run was ending"
    assert run.steps() == []


def test_groups_of_equal_rewards_do_not_train(started):
    run = started(
        "dynamic",
        "trainer.max_steps=3",
        "env=[workplace]",
        "rollout.dynamic_sampling=true",
        "rollout.max_resampled=50",
        *UNEVALUATED,
    )
    assert run.ended_cleanly() == 0, run.said
    rewards: dict[tuple[str, int], list[float]] = {}
    for row in read_index(run.directory / "rollouts"):
        if "reward" in row:
            rewards.setdefault((row["file"], row["group"]), []).append(row["reward"])
    differ = {group: len(set(values)) > 1 for group, values in rewards.items()}
    assert all(varied == file.startswith("step-") for (file, _), varied in differ.items())
    assert sum(differ.values()) == 3 * BATCH // GENERATIONS and not all(differ.values())
    filtered = sum(file.startswith("filtered-") for file, _ in differ)
    entries = [entry for entry in run.metrics() if "loss" in entry]
    assert sum(entry["queue/filtered"] for entry in entries) == filtered
