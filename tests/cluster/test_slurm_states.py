"""What Slurm says of jobs, and what it says when it does not answer, by scripts in its commands' place."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from gymexp.cluster import slurm_states as states
from gymexp.cluster.slurm_states import SlurmState, slurm_states
from gymexp.record.run_state import read_run

NO_ACCOUNTING = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


def test_no_job_needs_no_answer(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm_states([]) == {}
    assert slurm_states(["7"]) is None, "no Slurm"


def test_the_queue_is_asked_for_each_array_once_and_its_reasons_are_kept(commands, tmp_path):
    said = "echo '12_0|RUNNING|node1'; echo '9|PENDING|(Priority|x)'; echo bad"
    commands(squeue=f"printf '%s\n' \"$*\" > {tmp_path}/asked; {said}")
    assert slurm_states(["12_0", "9"]) == {
        "12_0": SlurmState("RUNNING", "node1"),
        "9": SlurmState("PENDING", "(Priority|x)"),
    }
    asked = (tmp_path / "asked").read_text().strip()
    assert asked == "-h -r -t all -o %i|%T|%R -j 12,9"


def test_accounting_is_asked_only_for_what_the_queue_has_forgotten(commands, tmp_path):
    accounted = "echo '12_0|FAILED|node9'; echo '12_1|CANCELLED by 1000|node2'"
    commands(
        squeue="echo '12_0|RUNNING|node1'; echo '12_3|RUNNING|node1'",
        sacct=f"printf '%s\\n' \"$*\" > {tmp_path}/asked; {accounted}",
    )
    assert slurm_states(["12_0"]) == {"12_0": SlurmState("RUNNING", "node1")}
    assert not (tmp_path / "asked").exists()
    assert slurm_states(["12_0", "12_1", "12_2"]) == {
        "12_0": SlurmState("RUNNING", "node1"),
        "12_1": SlurmState("CANCELLED", "node2"),
    }
    assert (tmp_path / "asked").read_text().strip() == "-n -P -X -j 12 -o JobID,State,NodeList"


@pytest.mark.parametrize(
    "squeue",
    [
        "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1",
        "echo 'squeue: error: Socket timed out on send/recv operation' >&2",
        "exit 1",
        "sleep 30",
    ],
)
def test_a_queue_that_does_not_answer_is_no_jobs_end(commands, monkeypatch, squeue):
    monkeypatch.setattr(states, "_TIMEOUT_S", 0.5)
    commands(squeue=squeue, sacct="exit 1")
    assert slurm_states(["7"]) is None


@pytest.mark.parametrize(
    ("sacct", "known"),
    [
        (NO_ACCOUNTING, {}),
        ("true", {}),
        ("echo 'sacct: error: Problem talking to the database: Connection refused' >&2; exit 1", None),
        ("sleep 30", None),
    ],
)
def test_a_forgotten_job_is_over_if_accounting_answers_or_is_none(commands, monkeypatch, sacct, known):
    monkeypatch.setattr(states, "_TIMEOUT_S", 0.5)
    commands(squeue=FORGOTTEN, sacct=sacct)
    assert slurm_states(["7"]) == known


def test_states_are_ends_or_waits_or_neither():
    some = (SlurmState(name) for name in ("PENDING", "RUNNING", "TIMEOUT"))
    assert {one.name: (one.waits, one.over) for one in some} == {
        "PENDING": (True, False),
        "RUNNING": (False, False),
        "TIMEOUT": (False, True),
    }
    for name in ["REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"]:
        assert SlurmState(name).waits and not SlurmState(name).over
    for name in [
        "SUSPENDED",
        "COMPLETING",
        "CONFIGURING",
        "STOPPED",
        "RESIZING",
        "SIGNALING",
        "POWER_UP_NODE",
        "STAGE_OUT",
    ]:
        assert not SlurmState(name).waits and not SlurmState(name).over


def test_a_run_of_a_job_is_not_lost_while_slurm_does_not_answer(tmp_path):
    """Its job waits for a node, or is suspended: its files are old, and a second job of it would be wrong."""
    status = {"host": "elsewhere", "pid": 1, "began": time.time() - 9000, "ended": None, "job_id": "7"}
    (tmp_path / "status.json").write_text(json.dumps(status))
    old(tmp_path / "status.json")
    assert read_run(tmp_path, None, "7").state == "waiting"
    assert read_run(tmp_path, {}, "7").state == "lost"
    assert read_run(tmp_path, {"7": SlurmState("SUSPENDED")}, "7").state == "running"


def old(path: Path) -> None:
    os.utime(path, (time.time() - 9000,) * 2)
