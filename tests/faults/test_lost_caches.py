"""Whole runs whose cache is read-only, lost a file of NeMo Gym's venv, or is deleted under them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from whole_run import UNEVALUATED

from gymexp.gym.install import find_damage
from gymexp.record.places import cache_dir

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
SHORT = [*UNEVALUATED, "trainer.max_steps=1", "trainer.save_steps=1"]


def linked(source: Path, target: Path) -> None:
    """A copy made of links to the files: what is deleted in it stays where it was linked from."""
    try:
        shutil.copytree(source, target, symlinks=True, copy_function=os.link)
    except (OSError, shutil.Error):
        pytest.skip(f"{source} is on another file system")


@pytest.fixture
def own_cache(gym_python, tmp_path, monkeypatch) -> Path:
    """A cache of the run's own, with all that the tests' cache has but vLLM."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in sorted(cache_dir().iterdir()):
        if path.is_dir() and not path.name.startswith("vllm"):
            linked(path, cache / path.name)
    monkeypatch.setenv("GYMEXP_CACHE", str(cache))
    return cache


@pytest.fixture
def make_read_only(own_cache: Path) -> Iterator[Callable[[], None]]:
    def mount() -> None:
        mounts = [["mount", "--bind", own_cache, own_cache], ["mount", "-o", "remount,ro,bind", own_cache]]
        if any(subprocess.run(mount, capture_output=True, check=False).returncode for mount in mounts):
            pytest.skip("this user may not mount")

    yield mount
    subprocess.run(["umount", "-l", own_cache], capture_output=True, check=False)


def test_a_read_only_cache_that_has_all_serves(started, own_cache, make_read_only, fault):
    run = started("writable", *SHORT)
    assert run.ended_cleanly() == 0, run.said
    make_read_only()
    with pytest.raises(OSError, match="Read-only"):
        (own_cache / "file").touch()
    blow = fault("The cache is read-only, and has all")
    run = started("read_only", *SHORT)
    assert run.ended_cleanly() == 0, run.said
    blow.over()
    assert run.steps() == [1]


def test_nemo_gyms_venv_that_lost_a_file_is_made_anew_and_the_run_trains(started, own_cache, fault):
    lost = next(own_cache.glob("nemo-gym-*/lib/python*/site-packages/nemo_gym/server_utils.py"))
    lost.unlink()
    blow = fault("NeMo Gym's venv lost a file")
    run = started("lost_file", *SHORT)
    assert run.ended_cleanly() == 0, run.said
    blow.over()
    assert "nemo_gym/server_utils.py is missing or cut short" in run.said
    assert run.steps() == [1] and find_damage(next(own_cache.glob("nemo-gym-0*.0"))) == ""


def test_a_run_whose_cache_is_deleted_ends_and_says_so_and_goes_on_with_a_new_one(started, own_cache, fault):
    run = started("deleted", *UNEVALUATED, "trainer.max_steps=100", "trainer.save_steps=1")
    run.wait_for_step(2)
    blow = fault("The cache is deleted while a run goes on")
    shutil.rmtree(own_cache)
    assert run.ended_cleanly() == 1
    blow.over()
    error = run.said[run.said.index("error: ") :]
    assert (
        f"NeMo Gym's venv in {own_cache}/nemo-gym-" in error and "lost files while the run went on" in error
    )
    assert error.strip().endswith(f"python -m gymexp.train 'resume={run.directory}'"), error
    last = max(run.steps())
    again = started("deleted", f"trainer.max_steps={last + 1}", resume=True)
    assert again.ended_cleanly() == 0, again.said
    assert again.steps() == list(range(1, last + 2))
