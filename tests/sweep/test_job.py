"""A job's starts are counted, and one that comes no further is given up."""

from __future__ import annotations

import json

import pytest

from gymexp.cluster.slurm_job import Allocation
from gymexp.errors import GymexpError
from gymexp.record.directory import RunDirectory
from gymexp.sweep.job import _count_start
from gymexp.sweep.kinds import TRAINING
from gymexp.training.checkpoints import seal


def start(run: RunDirectory, restarts: int, job_id: str = "1_0") -> None:
    _count_start(run, Allocation(job_id, restarts, "node1"), TRAINING)


def save(run: RunDirectory, step: int) -> None:
    (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    seal(run.checkpoints / f"checkpoint-{step}")


def test_a_job_that_saves_between_its_starts_may_be_started_for_ever(tmp_path):
    run = RunDirectory(tmp_path)
    for number in range(6):
        start(run, number)
        save(run, number)
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [(one["restarts"], one["progress"]) for one in starts] == [(0, None)] + [
        (number, number - 1) for number in range(1, 6)
    ]


def test_the_second_restart_in_vain_is_the_last(tmp_path):
    run = RunDirectory(tmp_path)
    start(run, 0)
    save(run, 4)
    start(run, 1)
    start(run, 2)
    with pytest.raises(GymexpError, match=r"job 1_0 was started 3 times without getting past checkpoint-4: "):
        start(run, 3)


def test_a_job_whose_newest_checkpoint_is_damaged_again_and_again_is_given_up_as_well(tmp_path):
    run = RunDirectory(tmp_path)
    save(run, 2)
    start(run, 0)
    save(run, 4)
    start(run, 1)
    (run.checkpoints / "checkpoint-4").rename(run.checkpoints / "damaged-checkpoint-4.1")
    with pytest.raises(GymexpError, match="started 3 times without getting past checkpoint-2"):
        start(run, 2)


def test_a_submission_of_its_own_counts_anew(tmp_path):
    run = RunDirectory(tmp_path)
    for number in (0, 1):
        start(run, number)
    start(run, 0, job_id="2")
    with pytest.raises(GymexpError, match="before its first checkpoint"):
        start(run, 2)


def test_an_allocation_is_named_as_the_queue_names_it(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert Allocation.of_this_process() is None
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    assert Allocation.of_this_process() == Allocation("9", 0, "node2")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert Allocation.of_this_process() == Allocation("7_3", 2, "node2")
