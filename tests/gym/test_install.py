"""NeMo Gym's venv: made once whoever asks, remade when not whole, and a clear word where no Python fits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gymexp.config.schema import GymConfig
from gymexp.errors import ConfigError, ServiceError
from gymexp.gym import install
from gymexp.gym.install import ensure_python

# Stands in for uv: notes what it is asked, makes a venv whose python says where nemo_gym lies.
FAKE_UV = """import pathlib, sys, time
calls = pathlib.Path({calls!r})
with calls.open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "venv":
    time.sleep(0.3)
    venv = pathlib.Path(sys.argv[-1])
    (venv / "bin").mkdir(parents=True)
    (venv / "site" / "nemo_gym").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(f"#!/bin/sh\\necho {{venv}}/site/nemo_gym\\n")
    python.chmod(0o755)
if {fails!r} and {fails!r} in sys.argv:
    sys.exit("error: " + {fails!r} + " is not there")
"""
SUDOKU = "resources_servers/reasoning_gym"


def no_folders(python: Path) -> tuple[str, ...]:
    return ()


@pytest.fixture
def fake_uv(tmp_path, monkeypatch):
    """Puts the stand-in in uv's place; gives the file of its calls. `fails`: what it cannot cope with."""

    def make(fails: str = "") -> Path:
        calls, uv = tmp_path / "calls", tmp_path / "uv"
        calls.touch()
        script = tmp_path / "uv.py"
        script.write_text(FAKE_UV.format(calls=str(calls), fails=fails))
        uv.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')  # a shebang takes no space
        uv.chmod(0o755)
        monkeypatch.setattr("uv.find_uv_bin", lambda: str(uv))
        monkeypatch.setattr(install, "find_python", lambda version, cache: "python3.12")
        return calls

    return make


def ensure(cache: Path, say=lambda text: None, folders=()) -> Path:
    return ensure_python(GymConfig(), lambda python: folders, cache, say)


def test_the_venv_is_made_on_first_use_and_found_on_the_second(tmp_path, fake_uv):
    calls = fake_uv()
    said: list[str] = []
    python = ensure(tmp_path / "cache", said.append)
    assert python == tmp_path / "cache" / "nemo-gym-0.4.0" / "bin" / "python"
    assert calls.read_text().splitlines() == [
        f"venv --quiet --python python3.12 {tmp_path / 'cache' / 'nemo-gym-0.4.0'}",
        f"pip install --quiet --python {python} nemo-gym==0.4.0 httptools",
    ]
    assert len(said) == 1 and said[0].startswith("making NeMo Gym 0.4.0's venv")
    assert ensure(tmp_path / "cache", said.append) == python
    assert len(calls.read_text().splitlines()) == 2
    assert len(said) == 1


def test_two_runs_at_once_make_it_once_and_the_second_says_that_it_waits(tmp_path, fake_uv):
    calls = fake_uv()
    said: list[str] = []
    made: list[Path] = []
    both = [
        threading.Thread(target=lambda: made.append(ensure(tmp_path / "cache", said.append)))
        for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(made) == 2 and made[0] == made[1]
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["venv", "pip"]
    assert sorted(line.split()[0] for line in said) == ["making", "waiting"]


def test_a_venv_that_was_not_finished_is_made_anew(tmp_path, fake_uv):
    calls = fake_uv()
    venv = tmp_path / "cache" / "nemo-gym-0.4.0"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text("half a file")
    ensure(tmp_path / "cache")
    assert calls.read_text().startswith("venv ")
    assert "half a file" not in (venv / "bin" / "python").read_text()
    assert (venv / "complete").exists()


def test_a_venv_whose_base_python_is_gone_is_made_anew(tmp_path, fake_uv):
    calls = fake_uv()
    python = ensure(tmp_path / "cache")
    python.unlink()
    python.symlink_to(tmp_path / "removed" / "python3.12")
    assert ensure(tmp_path / "cache").exists()
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["venv", "pip"] * 2


PACKAGE = "nemo_gym-0.4.0.dist-info"


def install_package(venv: Path) -> Path:
    """A package as uv leaves it: files, and a list of them with sizes; returns its folder."""
    site = venv / "lib" / "python3.12" / "site-packages"
    (site / PACKAGE).mkdir(parents=True)
    (site / "nemo_gym").mkdir()
    (site / "nemo_gym" / "__init__.py").write_text("")
    (site / "nemo_gym" / "cli, more.py").write_text("print()")
    listed = 'nemo_gym/__init__.py,sha256=x,0\n"nemo_gym/cli, more.py",sha256=y,7\n'
    (site / PACKAGE / "RECORD").write_text(f"{listed}{PACKAGE}/RECORD,,\n")
    return site


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda site: (site / "nemo_gym" / "__init__.py").unlink(), "nemo_gym/__init__.py is missing or"),
        (
            lambda site: (site / "nemo_gym" / "cli, more.py").write_text("pri"),
            "cli, more.py is missing or cut",
        ),
        (lambda site: shutil.rmtree(site / PACKAGE), f"{PACKAGE}/RECORD is missing"),
        (lambda site: shutil.rmtree(site), f"{PACKAGE}/RECORD is missing"),
        (lambda site: (site / "../../../bin/python").unlink(), "its python is gone"),
        (lambda site: (site / "../../../complete").unlink(), "it was not finished"),
    ],
)
def test_a_venv_that_lost_files_after_it_was_complete_is_made_anew(damage, told, tmp_path, fake_uv):
    calls = fake_uv()
    venv = ensure(tmp_path / "cache").parent.parent
    site = install_package(venv)
    ensure(tmp_path / "cache")
    damage(site)
    said: list[str] = []
    ensure(tmp_path / "cache", said.append)
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["venv", "pip"] * 2
    assert len(said) == 1 and told in said[0], said
    ensure(tmp_path / "cache", said.append)
    assert len(said) == 1, "once"
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [venv.name]


def test_a_venv_that_lost_files_while_a_run_went_on_is_told_and_a_users_own_is_not_ours_to_judge(
    tmp_path, fake_uv
):
    fake_uv()
    cache = tmp_path / "cache"
    python = ensure(cache)
    site = install_package(python.parent.parent)
    ensure(cache)
    assert install.lost(python, cache) == ""
    (site / "nemo_gym" / "__init__.py").unlink()
    assert install.lost(python, cache) == (
        f"NeMo Gym's venv in {python.parent.parent} lost files while the run went on "
        "(nemo_gym/__init__.py is missing or cut short)"
    )
    assert install.lost(python, tmp_path / "elsewhere") == ""


def test_a_venv_of_a_version_that_kept_no_list_is_taken_and_what_it_has_is_kept_from_then_on(
    tmp_path, fake_uv
):
    calls = fake_uv()
    venv = ensure(tmp_path / "cache").parent.parent
    site = install_package(venv)
    (venv / "complete").write_text("")
    ensure(tmp_path / "cache")
    assert len(calls.read_text().splitlines()) == 2
    shutil.rmtree(site / PACKAGE)
    ensure(tmp_path / "cache")
    assert len(calls.read_text().splitlines()) == 4


def test_a_damaged_venv_that_cannot_be_made_anew_is_still_there_and_both_causes_are_told(tmp_path, fake_uv):
    fake_uv()
    venv = ensure(tmp_path / "cache").parent.parent
    site = install_package(venv)
    (site / "nemo_gym" / "__init__.py").unlink()
    fake_uv(fails="nemo-gym==0.4.0")
    for _ in range(2):
        with pytest.raises(ServiceError) as caught:
            ensure(tmp_path / "cache")
        said = str(caught.value)
        assert (
            f"NeMo Gym's venv in {venv} is not whole (nemo_gym/__init__.py is missing or cut short)" in said
        )
        assert "uv could not install nemo-gym==0.4.0" in said
        assert (site / "nemo_gym" / "cli, more.py").exists()


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, and what makes it read-only."""
    at = tmp_path / "disk"
    at.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", at]
    if subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    yield at, lambda: subprocess.run(["mount", "-o", "remount,ro", at], check=True)
    subprocess.run(["umount", "-l", at], check=False)


def test_a_read_only_cache_serves_if_it_has_all_and_is_named_if_it_has_not(disk, fake_uv):
    cache, make_read_only = disk
    fake_uv()
    python = ensure(cache)
    install_package(python.parent.parent)
    make_read_only()
    assert ensure(cache) == python
    with pytest.raises(ConfigError) as caught:
        ensure_python(GymConfig(version="0.5.0"), no_folders, cache, print)
    said = str(caught.value)
    assert f"NeMo Gym's venv: cannot use {cache}/nemo-gym-0.5.0.lock: Read-only file system" in said
    assert said.endswith("or set GYMEXP_CACHE to a folder where this user may write")


def test_a_cache_that_is_a_file_is_named(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(ConfigError, match=r"cannot use .*/cache: .*set GYMEXP_CACHE"):
        ensure(tmp_path / "cache")


@pytest.mark.gym
def test_the_real_venv_with_a_file_missing_is_whole_again(gym_python, tmp_path):
    """In a copy, of links to the files: what is not there in it is still there for others."""
    ours, venv = gym_python.parent.parent, tmp_path / "nemo-gym-0.4.0"
    assert install.find_damage(ours) == ""
    try:
        shutil.copytree(ours, venv, symlinks=True, copy_function=os.link)
    except (OSError, shutil.Error):
        pytest.skip("the cache is on another file system")
    server_utils = next(venv.glob("lib/python*/site-packages/nemo_gym/server_utils.py"))
    server_utils.unlink()
    said: list[str] = []
    python = ensure(tmp_path, said.append)
    assert said[0].endswith("nemo_gym/server_utils.py is missing or cut short")
    assert install.find_damage(venv) == "" and server_utils.exists()
    assert install.site_packages(python) == server_utils.parent.parent


def test_a_failed_install_says_why_and_is_tried_again_by_the_next_run(tmp_path, fake_uv):
    fake_uv(fails="nemo-gym==0.4.0")
    with pytest.raises(ServiceError, match=r"uv could not install nemo-gym==0\.4\.0:\nerror: .*is not there"):
        ensure(tmp_path / "cache")
    assert not (tmp_path / "cache" / "nemo-gym-0.4.0" / "complete").exists()
    fake_uv()
    assert ensure(tmp_path / "cache").exists()


def test_what_an_environment_needs_is_added_when_it_is_first_selected(tmp_path, fake_uv):
    calls = fake_uv()
    python = ensure(tmp_path / "cache")
    folder = tmp_path / "cache" / "nemo-gym-0.4.0" / "site" / "resources_servers" / "reasoning_gym"
    folder.mkdir(parents=True)
    (folder / "requirements.txt").write_text("-e nemo-gym[dev] @ ../../\n# puzzles\nreasoning-gym>=0.1\n\n")
    for _ in range(2):
        ensure(tmp_path / "cache", folders=[SUDOKU])
    tried, installed = calls.read_text().splitlines()[2:]
    assert tried.startswith(f"pip install --dry-run --quiet --python {python} nemo-gym==0.4.0 ")
    assert installed.startswith(f"pip install --quiet --python {python} nemo-gym==0.4.0 -r ")
    [marker] = python.parent.parent.glob("needs-*")
    assert marker.read_text() == "reasoning-gym>=0.1\n"


@pytest.mark.parametrize(
    ("python", "said"),
    [
        (
            "no/such/python",
            r"gym\.python must be an interpreter with nemo_gym, but no/such/python does not exist",
        ),
        (sys.executable, r"has no nemo_gym"),
        ("/", r"/ cannot be run: Permission denied"),
    ],
)
def test_a_given_interpreter_must_have_nemo_gym(python, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        ensure_python(GymConfig(python=python), no_folders, tmp_path, print)
    assert not list(tmp_path.iterdir()), "nothing is made for it"


def test_a_checkouts_own_venv_is_taken_as_it_is(tmp_path):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho here/nemo_gym\n")
    python.chmod(0o755)
    gym = GymConfig(runtime="cli", checkout=str(tmp_path))
    assert ensure_python(gym, no_folders, tmp_path / "cache", print) == python
    assert install.site_packages(python) == Path("here")


def test_our_own_venv_keeps_what_is_compiled_and_a_users_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("GYMEXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    ours = install.environ_for(tmp_path / "cache" / "nemo-gym-0.4.0" / "bin" / "python")
    assert ours == {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    assert install.environ_for(tmp_path / "checkout" / ".venv" / "bin" / "python") == dict(os.environ)


@pytest.mark.gym
def test_the_real_venv_has_nemo_gym_and_what_both_environments_need(gym_python):
    code = "import importlib.util as u; print(all(map(u.find_spec, ('nemo_gym', 'reasoning_gym', 'pandas'))))"
    shown = subprocess.run([gym_python, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "True"
