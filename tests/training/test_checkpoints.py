"""A checkpoint is whole or it is not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gymexp.config import CheckpointConfig
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


STEPS = st.sets(st.integers(1, 200), min_size=1, max_size=12)
POLICIES = st.builds(
    CheckpointConfig,
    keep_last=st.none() | st.integers(1, 5),
    keep_best=st.integers(0, 3),
    keep_every=st.none() | st.integers(1, 50),
)


@given(STEPS, st.dictionaries(st.integers(1, 200), st.sampled_from([0.0, 0.5, 1.0])), POLICIES)
def test_what_goes_is_neither_among_the_last_nor_the_best_nor_one_of_every_so_many(steps, scores, policy):
    gone = checkpoints.outdated(steps, scores, policy)
    stays = steps - gone
    assert gone < steps and max(steps) in stays
    if policy.keep_last is None:
        assert not gone
        return
    assert len(stays) >= min(policy.keep_last, len(steps))
    scored = [step for step in steps if step in scores]
    for step in gone:
        assert sum(other > step for other in stays) >= policy.keep_last
        assert not policy.keep_every or step % policy.keep_every
        if step in scores:
            better = [o for o in scored if (scores[o], o) > (scores[step], step)]
            assert len(better) >= policy.keep_best
    for step in stays:  # nothing stays without a reason
        newer = sum(other > step for other in steps)
        better = sum((scores[o], o) > (scores[step], step) for o in scored) if step in scores else len(steps)
        every = policy.keep_every and step % policy.keep_every == 0
        assert newer < policy.keep_last or better < policy.keep_best or every


@given(STEPS, POLICIES)
def test_deleting_as_they_come_keeps_the_last_and_every_so_many_as_deleting_at_the_end_does(steps, policy):
    standing: set[int] = set()
    for step in sorted(steps):
        standing.add(step)
        standing -= checkpoints.outdated(standing, {}, policy)
    assert standing == steps - checkpoints.outdated(steps, {}, policy)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_deletion_that_was_cut_short_hides_nothing_and_is_finished_by_the_next(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        make(tmp_path, step)
    removed = shutil.rmtree

    def dies(path, *_):
        (Path(path) / "trainer_state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.prune(tmp_path, CheckpointConfig(keep_last=1), {})
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-3"
    assert all(checkpoints.whole(p) for p in tmp_path.glob("checkpoint-*"))
    monkeypatch.setattr(shutil, "rmtree", removed)
    checkpoints.prune(tmp_path, CheckpointConfig(keep_last=1), {})
    assert names(tmp_path) == {"checkpoint-3"}


def test_a_write_that_was_cut_short_is_removed_once_a_newer_one_is_whole_and_a_changed_one_is_left(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    (tmp_path / "checkpoint-1" / "complete.json").unlink()
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-4" / "complete.json").unlink()
    checkpoints.prune(tmp_path, CheckpointConfig(), {})
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}


def test_the_best_has_a_link_that_follows_it(tmp_path):
    policy = CheckpointConfig(keep_last=1, keep_best=1)
    scores = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.9}
    seen = []
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
        checkpoints.prune(tmp_path, policy, scores)
        seen.append((os.readlink(tmp_path / "best"), names(tmp_path) - {"best"}))
    assert seen[:2] == [("checkpoint-1", {"checkpoint-1"}), ("checkpoint-2", {"checkpoint-2"})]
    assert seen[2:] == [
        ("checkpoint-2", {"checkpoint-2", "checkpoint-3"}),
        ("checkpoint-4", {"checkpoint-4"}),
    ]


def test_what_cannot_be_deleted_is_warned_of_and_ends_nothing(tmp_path, caplog, monkeypatch):
    for step in (1, 2):
        make(tmp_path, step)

    def refuses(path, *_):
        raise OSError("Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", refuses)
    checkpoints.prune(tmp_path, CheckpointConfig(keep_last=1), {})
    assert "could not be deleted: Device or resource busy" in caplog.text
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-2"


def test_a_score_is_the_mean_over_environments_and_needs_all_of_them(tmp_path):
    entries = [
        {"step": 1, "loss": 0.1, "a/reward": 1.0},
        {"step": 1, "eval_a/reward": 0.5, "eval_b/reward": 1.0},
        {"step": 2, "eval_a/reward": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert checkpoints.read_scores(tmp_path / "metrics.jsonl", ["a", "b"]) == {1: 0.75}
    assert checkpoints.read_scores(tmp_path / "nothing.jsonl", ["a"]) == {}
