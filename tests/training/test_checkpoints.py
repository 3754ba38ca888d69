"""A checkpoint is whole or it is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gymexp.errors import RunDirectoryError
from gymexp.training import checkpoints


def make(directory: Path, step: int, size: int = 10_000) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    with checkpoints.writing(path):
        (path / "model.safetensors").write_bytes(os.urandom(size))
        (path / "trainer_state.json").write_text("{}")
    return path


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    make(tmp_path, 9)
    newest = make(tmp_path, 10)
    assert checkpoints.latest(tmp_path) == newest


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path, caplog):
    older, newer = make(tmp_path, 10), make(tmp_path, 20)
    with (newer / "model.safetensors").open("r+b") as file:
        file.truncate(5_000)
    assert checkpoints.latest(tmp_path) == older
    assert "checkpoint-20 is cut short" in caplog.text


def test_a_checkpoint_without_its_manifest_is_not_whole(tmp_path):
    path = make(tmp_path, 10)
    (path / "complete.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"no checkpoint .* is whole: checkpoint-10"):
        checkpoints.latest(tmp_path)


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
    assert checkpoints.latest(tmp_path) is None


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_loses_the_new_checkpoint_alone_and_says_so(small_disk):
    make(small_disk, 10)
    target = small_disk / "checkpoint-20"
    target.mkdir()
    with (
        pytest.raises(
            checkpoints.CheckpointError, match=r"could not write .*checkpoint-20.*MB free.*from checkpoint-10"
        ),
        checkpoints.writing(target),
    ):
        torch.save(torch.zeros(1_000_000), target / "optimizer.pt")
    assert not target.exists()
    assert checkpoints.latest(small_disk) == small_disk / "checkpoint-10"


def test_sealed_sizes_survive_a_reader_in_another_process(tmp_path):
    path = make(tmp_path, 3)
    imports = "from pathlib import Path; from gymexp.training.checkpoints import whole"
    code = f"{imports}; print(whole(Path({str(path)!r})))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "True"
