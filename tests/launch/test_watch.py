"""How jobs are, from what Slurm's commands say (here scripts) or fail to say, and from the runs' files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gymexp.launch import watch


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Puts scripts of these names on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def put(**scripts: str) -> None:
        for name, body in scripts.items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)

    return put


def test_the_queue_is_asked_first_and_accounting_for_what_it_has_forgotten(commands):
    commands(
        squeue="echo '12_0|RUNNING|node1'; echo '12_1|PENDING|(Resources)'",
        sacct="case \"$*\" in *12,7*) echo '12_2|CANCELLED by 0|node2';; esac",
    )
    assert watch.states(["12_0", "12_1", "12_2", "7"]) == {
        "12_0": "RUNNING",
        "12_1": "PENDING",
        "12_2": "CANCELLED",
        "7": watch.GONE,
    }


def test_without_accounting_a_forgotten_job_is_gone(commands):
    commands(
        squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1",
    )
    assert watch.states(["7"]) == {"7": watch.GONE}


def test_a_slurm_that_does_not_answer_says_nothing_about_any_job(commands):
    commands(squeue="echo 'Unable to contact slurm controller' >&2; exit 1", sacct="exit 1")
    assert watch.states(["7"]) is None


def end(sweep: Path, result: dict | None, state: str) -> watch.End:
    (sweep / "3").mkdir(exist_ok=True)
    if result is not None:
        (sweep / "3" / "result.json").write_text(json.dumps(result))
    return watch.end_of(sweep, {"num": 3, "job_id": "12_3", "swept": {"seed": "1"}}, state)


def test_an_end_is_what_the_run_says_and_slurms_word_where_it_says_nothing(tmp_path):
    ended = end(tmp_path, None, "OUT_OF_MEMORY")
    assert (ended.name, ended.error) == (
        "job 3 (seed=1)",
        "job 12_3 ended without a result; Slurm says OUT_OF_MEMORY",
    )
    assert ended.log == tmp_path / "slurm" / "12_3_0_log.out"
    stopped = end(tmp_path, {"step": 2, "stopped": True, "held_out": {}}, "CANCELLED")
    assert stopped.error == "job 12_3 ended without a result; Slurm says CANCELLED"
    assert end(tmp_path, {"error": "why"}, "FAILED").error == "why"
    finished = end(tmp_path, {"step": 3, "stopped": False, "held_out": {}}, watch.GONE)
    assert finished.error is None and finished.result["step"] == 3
