"""Whole runs whose disk is full, and whose directory is moved or deleted under them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from whole_run import UNEVALUATED, Run

from gymexp.training import checkpoints

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
SUDOKU = ["env=[sudoku]", "env.sudoku.data.train_size=64", "env.sudoku.data.validation_size=8"]
LONG = [*SUDOKU, *UNEVALUATED, "trainer.max_steps=1000"]


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 150 MB, with a name for a run's directory."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150m", "none", disk], check=False)
    if mounted.returncode:
        pytest.skip("this user may not mount")
    yield disk
    subprocess.run(["umount", "-l", disk], check=False)
    disk.rmdir()


def ended_for_one_cause(run: Run) -> str:
    """What the run said of its end, after which nothing of it is left."""
    assert run.ended_cleanly() == 1, run.said
    assert run.said.count("error: ") == 1, run.said
    return run.said[run.said.index("error: ") :].strip()


def fill(disk: Path) -> Path:
    """Writes a file that leaves no room on the disk, and returns it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    return filler


def goes_on(run: Run, started: Callable[..., Run]) -> None:
    """Asserts that the run, once there is room, goes on from its last checkpoint and trains one step more."""
    last = max(run.steps())
    # A checkpoint may have been in the way of its own end, as may the newest line of metrics.
    before = checkpoints.newest_step(run.directory / "checkpoints")
    assert before and before >= last - 2
    again = started(run.directory.name, f"trainer.max_steps={last + 1}", resume=True)
    assert again.ended() == 0, again.said
    assert again.steps() == list(range(1, last + 2))


def test_a_full_disk_ends_a_run_that_goes_on_once_there_is_room(started, small_disk, gym_python, fault):
    run = started("disk", *LONG)
    run.wait_for(lambda: checkpoints.newest_step(run.directory / "checkpoints"))
    blow = fault("The disk is full while a run goes on")
    filler = fill(small_disk)
    said = ended_for_one_cause(run)
    assert blow.over() < 60
    assert f"{small_disk}/" in said and "No space left on device (0 MB free there)" in said, said
    assert "make room" in said
    assert not list(small_disk.rglob("*.part")), "half a file takes room, and serves nobody"
    filler.unlink()
    goes_on(run, started)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("rollouts", "The disk of its rollouts is full"),
        ("checkpoints", "The disk of its checkpoints is full"),
    ],
)
def test_a_full_disk_behind_a_link_ends_a_run_that_goes_on_once_there_is_room(
    name, row, started, small_disk, folder, gym_python, fault
):
    (folder / name).mkdir()
    (small_disk / name).mkdir()
    (folder / name / name).symlink_to(small_disk / name)
    run = started(name, *LONG)
    run.wait_for(lambda: checkpoints.newest_step(run.directory / "checkpoints"))
    blow = fault(row)
    filler = fill(small_disk)
    said = ended_for_one_cause(run)
    assert blow.over() < 60
    assert f"{run.directory / name}/" in said and "No space left on device (0 MB free there)" in said, said
    assert "make room" in said
    assert not list(small_disk.rglob("*.part")), "half a file takes room, and serves nobody"
    filler.unlink()
    goes_on(run, started)


def test_a_run_whose_directory_is_moved_says_where_it_goes_on_and_one_that_is_deleted_ends(
    started, folder, gym_python, fault
):
    run = started("here", *LONG)
    run.wait_for(lambda: checkpoints.newest_step(run.directory / "checkpoints"))
    there = folder / "there"
    blow = fault("The run directory is moved")
    run.directory.rename(there)
    said = ended_for_one_cause(run)
    assert blow.over() < 20
    assert f"the run directory {run.directory} was moved to {there} while the run went on" in said
    assert said.endswith(f"python -m gymexp.train 'resume={there}'")
    assert not run.directory.exists(), "nothing makes it anew"
    newest = checkpoints.newest_step(there / "checkpoints")

    again = started("there", "trainer.max_steps=2000", resume=True)
    again.wait_for_step(newest + 1)
    blow = fault("The run directory is deleted")
    shutil.rmtree(there, ignore_errors=True)
    while there.exists():  # the run may have written while it was deleted
        shutil.rmtree(there, ignore_errors=True)
    said = ended_for_one_cause(again)
    assert blow.over() < 20
    assert f"the run directory {there} was deleted while the run went on" in said
    assert not there.exists(), list(there.rglob("*"))
