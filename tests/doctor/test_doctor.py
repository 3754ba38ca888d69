"""The doctor's command, in a copy of gymexp whose conf/ may be written to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """gymexp and its conf/, without a machine file; and no commands but those that `bin` is given."""
    skip = shutil.ignore_patterns("__pycache__", "machine")
    for name in ("gymexp", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    (tmp_path / "bin").mkdir()
    return tmp_path


def command(copy: Path, name: str, script: str) -> None:
    (copy / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
    (copy / "bin" / name).chmod(0o755)


def doctor(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1", "PATH": str(copy / "bin")}
    env["PATH"] += ":/usr/bin:/bin"
    run = [sys.executable, "-m", "gymexp.doctor", *arguments]
    return subprocess.run(run, cwd=copy, env=env, capture_output=True, text=True, check=False, timeout=120)


def line(shown: subprocess.CompletedProcess[str], what: str) -> str:
    return next(text for text in shown.stdout.splitlines() if text[6:].startswith(what))


def test_commands_that_hang_do_not_hang_the_doctor(copy):
    for name in ("sinfo", "nvidia-smi"):
        command(copy, name, "sleep 300")
    began = time.monotonic()
    shown = doctor(copy)
    assert time.monotonic() - began < 60
    assert shown.returncode == 1, shown.stdout + shown.stderr
    assert line(shown, "gpu").startswith("fail") and line(shown, "slurm").startswith("warn")
    assert line(shown, "ports").startswith("ok")


def test_a_run_that_lacks_something_is_told_what_and_the_exit_code_says_so(copy):
    shown = doctor(copy, "model.path=nobody/has-this", "tracker=wandb", "tracker.mode=offline")
    assert shown.returncode == 1
    assert "model.path=nobody/has-this is not here" in line(shown, "hub")
    assert line(shown, "tracker") == "ok    tracker          wandb, offline"


def test_a_wrong_key_is_told_and_the_machine_checked_all_the_same(copy):
    shown = doctor(copy, "engine.knid=hf")
    assert shown.returncode == 1 and "did you mean engine.kind?" in line(shown, "configuration")
    assert line(shown, "python").startswith("ok")


def test_init_writes_this_clusters_defaults_once_and_a_run_takes_them(copy):
    command(copy, "sinfo", "echo 'h200*|up|4:00:00|3|gpu:h200:8|128|1000000'")
    command(copy, "sacctmgr", "echo lab")
    first = doctor(copy, "--init")
    written = copy / "conf" / "machine" / "default.yaml"
    assert first.returncode == 0 and written.read_text() in first.stdout
    compose = "from gymexp.doctor.configuration import composed; print(composed(['launcher=slurm'])[0])"
    env = os.environ | {"PYTHONPATH": str(copy)}
    said = subprocess.run(
        [sys.executable, "-c", compose], cwd=copy, env=env, capture_output=True, text=True, check=True
    )
    assert "partition='h200', account='lab', qos=None, time='4:00:00'" in said.stdout
    assert "gpus=8, cpus=128, mem='1000000M', array_parallelism=3" in said.stdout

    written.write_text("# @package _global_\nlauncher:\n  partitoin: h200\n")
    again = doctor(copy, "--init")
    assert again.returncode == 1 and "--init --force" in again.stderr and "partitoin" in written.read_text()
    broken = doctor(copy)
    assert broken.returncode == 1 and line(broken, "machine file").startswith("fail")
    assert doctor(copy, "--init", "--force").returncode == 0 and "partitoin" not in written.read_text()


def test_init_without_slurm_writes_a_file_that_changes_nothing(copy):
    command(copy, "sinfo", "exit 1")
    assert doctor(copy, "--init").returncode == 0
    shown = doctor(copy)
    assert line(shown, "machine file").startswith("ok")
