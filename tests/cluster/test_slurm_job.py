"""What a job asks of its own Slurm, which may be busy or away; scripts stand in Slurm's place."""

from __future__ import annotations

import time

import pytest

from gymexp.cluster import slurm_job as allocation
from gymexp.cluster.slurm_job import Allocation

AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
JOB = Allocation("7_3", 0, "node1")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(allocation, "_TIMEOUT_S", 2.0)
    monkeypatch.setattr(allocation, "_RETRY_INTERVAL_S", 0.05)


@pytest.mark.parametrize(
    ("squeue", "goes_on"),
    [
        ("echo RUNNING", True),
        ("true", True),
        ("echo COMPLETING", False),
        ("echo CANCELLED", False),
        ("echo 'error: none such' >&2; exit 1", True),
    ],
)
def test_a_signal_is_a_warning_while_slurm_counts_the_job_as_running(commands, squeue, goes_on, tmp_path):
    commands(squeue=f"echo $* > {tmp_path}/asked; {squeue}")
    assert JOB.goes_on() is goes_on
    assert (tmp_path / "asked").read_text() == "--noheader --states=all --jobs=7_3 --format=%T\n"


def test_a_controller_that_is_away_for_a_moment_is_asked_again(commands, tmp_path):
    first = f"[ -e {tmp_path}/again ] || {{ touch {tmp_path}/again; echo '{AWAY}' >&2; exit 1; }}"
    commands(scontrol=f"{first}; echo $* > {tmp_path}/asked")
    assert JOB.requeue() == ""
    assert (tmp_path / "asked").read_text() == "requeue 7_3\n"


def test_a_controller_that_stays_away_is_given_up_in_time_and_its_complaint_kept(commands):
    commands(scontrol=f"echo '{AWAY}' >&2; exit 1")
    began = time.monotonic()
    assert JOB.requeue() == AWAY
    assert 1 < time.monotonic() - began < 10


def test_what_the_controller_refuses_is_not_asked_again(commands, tmp_path):
    refusal = "echo 'Requested operation is presently disabled' >&2; exit 1"
    commands(scontrol=f"echo x >> {tmp_path}/asked; {refusal}")
    assert JOB.requeue() == "Requested operation is presently disabled"
    assert (tmp_path / "asked").read_text() == "x\n"
    commands(scontrol="exit 1")
    assert JOB.requeue() == "scontrol failed"


def test_a_command_that_hangs_or_is_missing_is_a_complaint(commands, monkeypatch):
    monkeypatch.setattr(allocation, "_TIMEOUT_S", 0.3)
    commands(scontrol="sleep 30")
    assert "timed out" in JOB.requeue()
    monkeypatch.setenv("PATH", "/nowhere")
    assert JOB.requeue().startswith("scontrol: ")
    assert JOB.goes_on(), "nothing says that it was cancelled"


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"SLURM_JOB_ID": "9"}, Allocation("9", 0, "")),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7"}, Allocation("9", 0, "")),
        (
            {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"},
            Allocation("7_0", 0, ""),
        ),
        (
            {"SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "2", "SLURMD_NODENAME": "n"},
            Allocation("9", 2, "n"),
        ),
    ],
)
def test_a_job_is_known_by_its_environment(monkeypatch, variables, found):
    for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert Allocation.of_this_process() is None
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Allocation.of_this_process() == found
