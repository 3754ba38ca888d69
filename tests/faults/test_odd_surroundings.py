"""Whole runs in surroundings that nobody would wish for: few files, no HOME, a clock that is set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from whole_run import OVERRIDES, ROOT, UNEVALUATED, metrics_of, steps_of

from gymexp.record.places import cache_dir
from gymexp.record.run_state import read_run, wall_seconds

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
ODD = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
ODD |= {"PATH": "/nowhere", "TMPDIR": "/nowhere", "GYMEXP_CACHE": str(cache_dir())}


def test_256_open_files_no_path_no_home_and_another_locale_are_enough(folder, gym_python, fault):
    """Both environments, as many rollouts at once as a run has that does not say."""
    directory, here = folder / "größe", folder / "hier"
    here.mkdir(parents=True, exist_ok=True)
    environ = {k: v for k, v in os.environ.items() if k not in ("HOME", "LANG")} | ODD
    batch = ["trainer.max_steps=1", "trainer.per_device_train_batch_size=64", "trainer.save_steps=1"]
    run = [*OVERRIDES, *UNEVALUATED, *batch, f"hydra.run.dir='{directory}'", "name='läuft'"]
    command = 'umask 077; ulimit -n 256; exec "$0" -m gymexp.train "$@"'
    odd = fault("256 open files, no PATH, HOME and TMPDIR, another locale, umask 077")
    done = subprocess.run(
        ["/bin/sh", "-c", command, sys.executable, *run],
        capture_output=True,
        cwd=here,
        env=environ | {"PYTHONPATH": str(ROOT)},
        timeout=500,
        check=False,
    )
    odd.over()
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0 and "Traceback" not in said, said
    assert steps_of(directory) == [1]
    step = metrics_of(directory)[0]
    assert step["sudoku/rollouts"] + step["workplace/rollouts"] == 128
    assert step["sudoku/failed"] == step["workplace/failed"] == 0
    logs = "".join(log.read_text() for log in (directory / "logs").glob("*.log"))
    assert "Too many open files" not in logs and "out of system resource" not in logs
    written = [
        p for p in directory.rglob("*") if not p.is_symlink() and p.parts[len(directory.parts)] != "code"
    ]
    assert [p for p in written if p.stat().st_mode & 0o077] == [], "umask 077 keeps others out"
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(directory) in " ".join(p.info.get("cmdline") or [])
    ]


@pytest.fixture
def clock(tmp_path, monkeypatch) -> Path:
    """A file that says by how many seconds the clock of every process started from now on is wrong."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler")
    by, library = tmp_path / "by", tmp_path / "set_clock.so"
    by.write_text("0")
    source = ROOT / "tests" / "set_clock.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("SET_CLOCK_BY", str(by))
    return by


def test_a_clock_that_is_set_back_and_forth_changes_nothing(started, gym_python, clock, fault):
    run = started("clock", *UNEVALUATED, "trainer.max_steps=8", "gym.health_interval_s=1")
    run.wait_for_step(1)
    blow = fault("The clock is set back by an hour, then forward")
    clock.write_text("-3600")
    run.wait_for_step(4)
    clock.write_text("3600")
    run.wait_for_step(7)
    blow.over()
    assert run.ended_cleanly() == 0, run.said
    assert run.steps() == list(range(1, 9))
    assert "starting it again" not in run.said and "has not answered" not in run.said, run.said
    off = [entry["time"] - time.time() for entry in run.metrics()]
    assert min(off) < -3000 and max(off) > 3000, "the clock was set in the run's own processes"
    assert all(0 < entry["time/step"] < 600 for entry in run.metrics() if "loss" in entry)
    assert 0 < wall_seconds(read_run(run.directory)) < 600
