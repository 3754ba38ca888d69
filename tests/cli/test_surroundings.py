"""Commands in surroundings that nobody would wish for: they say what is wrong in a line, or do their work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def command(*words: str, cwd: Path = ROOT, shell: str = "", **environ: str | None):
    """What `python -m gymexp.train` says and its exit code. shell: done before it, in the same process."""
    inherited = {k: v for k, v in os.environ.items() if k not in environ}
    env = inherited | {k: v for k, v in environ.items() if v is not None} | {"PYTHONPATH": str(ROOT)}
    line = f'{shell}; exec "$0" -m gymexp.train "$@"' if shell else 'exec "$0" -m gymexp.train "$@"'
    started = ["/bin/sh", "-c", line, sys.executable, *words]
    done = subprocess.run(started, capture_output=True, cwd=cwd, env=env, timeout=120, check=False)
    return done.returncode, (done.stdout + done.stderr).decode()


REFUSED = {
    "cwd": ("mkdir gone && cd gone && rmdir ../gone", {}, "the working directory was deleted"),
    "umask": ("umask 0277", {}, "umask must leave a file's owner all rights, but 0277 takes some"),
    "home": ("", {"HOME": "/proc", "GYMEXP_CACHE": None}, "cannot use /proc/.cache"),
    "cache": ("touch file", {"GYMEXP_CACHE": "file"}, "cannot use file: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nothing_can_be_done_about_is_said_in_one_line(name, tmp_path):
    shell, environ, said = REFUSED[name]
    where = [f"output_dir={tmp_path / 'run'}"]
    code, shown = command("experiment=quickstart", *where, cwd=tmp_path, shell=shell, **environ)
    assert code == 1 and "Traceback" not in shown, shown
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0], shown
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_too_many_rollouts_for_the_limit_on_open_files_are_refused_before_anything_starts(tmp_path):
    where = [f"output_dir={tmp_path / 'run'}"]
    asked = "env.sudoku.max_concurrency=64"
    code, shown = command("experiment=quickstart", asked, *where, shell="ulimit -n 256")
    assert code == 1 and "env.sudoku.max_concurrency must be at most 36, got 64" in shown, shown


def test_what_the_locale_has_no_letters_for_is_read_and_printed(tmp_path):
    code, shown = command("name='läuft'", "trainer.lr=1", f"hydra.run.dir='{tmp_path / 'größe'}'", **ASCII)
    assert code == 1 and "Traceback" not in shown, shown
    assert "trainer.lr is not an argument of trl.GRPOConfig" in shown
    code, shown = command("env=[sudökü]", **ASCII)
    assert code == 1 and "Traceback" not in shown and r"sud\xf6k\xfc" in shown, shown


@pytest.mark.parametrize("environ", [{"PATH": "/nowhere"}, {"PATH": None}, {"HOME": None}, {"TMPDIR": "/no"}])
def test_what_is_missing_around_a_command_does_not_hide_what_it_has_to_say(environ, tmp_path):
    code, shown = command("trainer.lr=1", f"hydra.run.dir={tmp_path / 'run'}", **environ)
    assert code == 1 and "Traceback" not in shown, shown
    assert "trainer.lr is not an argument of trl.GRPOConfig" in shown


def test_what_the_terminals_disk_has_no_room_for_ends_nothing(tmp_path):
    """Output that goes to a file on a full disk, as of `nohup`."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    program = (
        "import sys\nfrom gymexp.cli.entry import outlive_readers\noutlive_readers()\n"
        "for _ in range(3):\n    print('x' * 10_000, flush=True)\n"
        f"open({str(tmp_path / 'done')!r}, 'w').close()\nimport os; os._exit(0)\n"
    )
    with open("/dev/full", "w") as full:
        subprocess.run([sys.executable, "-c", program], stdout=full, check=False)
    assert (tmp_path / "done").exists()
