"""A whole run in surroundings that nobody would wish for."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest
from whole_run import OVERRIDES, ROOT, UNEVALUATED, metrics_of, steps_of

from gymexp.run.directory import cache_dir

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
