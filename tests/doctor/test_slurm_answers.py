"""What Slurm's commands say, and whether a job as asked for can start there."""

from __future__ import annotations

from functools import partial

import pytest
from commands import put

from gymexp.config.schema import LauncherConfig, RunConfig
from gymexp.doctor import finding, slurm
from gymexp.doctor.finding import Subject

SINFO = """echo 'cpu*|up|4:00:00|10|(null)|32|64000'
echo 'h200|up|2-00:00:00|3|gpu:h200:8(S:0-1)|128|1000000+'
echo 'h200|up|2-00:00:00|1|gpu:h200:4,mps:400|64|500000'
echo 'old|down|infinite|1|gpu:1|8|1000'"""
CLUSTER = {
    "sinfo": SINFO,
    "scontrol": "echo 'PartitionName=h200 PreemptMode=REQUEUE GraceTime=60'",
    "sacct": "exit 0",
    "sacctmgr": """case "$*" in *assoc*) printf 'lab\\nother\\n';; *) echo other;; esac""",
}


def job(**launcher) -> list[finding.Finding]:
    return list(slurm.look(Subject(RunConfig(launcher=LauncherConfig(**launcher)), "slurm")))


def test_partitions_are_those_that_are_up_with_their_largest_nodes(monkeypatch, tmp_path):
    put(monkeypatch, tmp_path / "bin", **CLUSTER)
    assert slurm.partitions() == [
        slurm.Partition("cpu", True, 240, 10, 0, 32, 64000),
        slurm.Partition("h200", False, 2880, 3, 8, 128, 1000000, "requeue"),
    ]
    assert slurm.accounts() == ["other", "lab"]


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ({"partition": "h20"}, "launcher.partition=h20 is not up here; did you mean h200?"),
        ({"partition": "old"}, "launcher.partition=old is not up here"),
        ({}, "launcher.time=1-00:00:00 is above cpu's limit, 240 min"),
        ({"partition": "h200", "gpus": 16}, "launcher.gpus=16: a node of h200 has 8"),
        ({"partition": "h200", "account": "lba"}, "launcher.account=lba is not yours: other, lab"),
    ],
)
def test_a_job_that_could_never_start_is_a_failure(monkeypatch, tmp_path, launcher, said):
    put(monkeypatch, tmp_path / "bin", **CLUSTER)
    found = job(**launcher)[-1]
    assert found.level == "fail" and said in found.text


def test_a_job_that_fits_is_well(monkeypatch, tmp_path):
    put(monkeypatch, tmp_path / "bin", **CLUSTER)
    assert {one.level for one in job(partition="h200", gpus=8, account="lab", time="2-00")} == {"ok"}


def test_an_accounting_that_hangs_is_a_warning_and_the_rest_is_told(monkeypatch, tmp_path):
    put(monkeypatch, tmp_path / "bin", **CLUSTER | {"sacct": "sleep 60"})
    monkeypatch.setattr(slurm, "run_command", partial(finding.run_command, timeout_s=1))
    by_name = {one.name: one for one in job(partition="h200")}
    assert by_name["slurm: sacct"].level == "warn"
    assert by_name["slurm: job"].level == "ok"


def test_a_controller_that_is_away_fails_only_a_run_on_slurm(monkeypatch, tmp_path):
    put(monkeypatch, tmp_path / "bin", sinfo="echo 'Unable to contact slurm controller' >&2; exit 1")
    assert [(one.level, one.text) for one in job()] == [("fail", "Unable to contact slurm controller")]
    assert [one.level for one in slurm.look(Subject(RunConfig()))] == ["warn"]


@pytest.mark.parametrize(
    ("time", "expected"),
    [("60", 60), ("30:00", 30), ("4:00:00", 240), ("1-00", 1440), ("1-12:30:00", 2190), ("infinite", None)],
)
def test_times_are_read_as_slurm_writes_them(time, expected):
    assert slurm.minutes(time) == expected


@pytest.mark.slurm
def test_a_real_cluster_is_understood(slurm):
    from gymexp.doctor.slurm import look, partitions

    found = partitions()
    assert isinstance(found, list) and found[0].is_default and found[0].cpus > 0
    subject = Subject(RunConfig(launcher=LauncherConfig(partition=found[0].name, time="10")), "slurm")
    assert {one.level for one in look(subject)} == {"ok"}
