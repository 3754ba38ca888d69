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

from gymexp.config.schema import CheckpointConfig
from gymexp.errors import RunDirectoryError
from gymexp.training import checkpoints


def make(directory: Path, step: int, size: int = 10_000) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    with checkpoints.writing(path):
        (path / "model.safetensors").write_bytes(os.urandom(size))
        (path / "trainer_state.json").write_text("{}")
        (path / "global_step").mkdir()
        (path / "global_step" / "rng_state.pth").write_bytes(os.urandom(100))
    return path


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    make(tmp_path, 9)
    newest = make(tmp_path, 10)
    assert checkpoints.latest(tmp_path) == newest


def invert(path: Path, begin: int = 0, count: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[begin : begin + count] = bytes(255 - byte for byte in data[begin : begin + count])
    path.write_bytes(data)


WEIGHTS, RANDOM, MANIFEST = "model.safetensors", "global_step/rng_state.pth", "complete.json"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: os.truncate(p / WEIGHTS, 5_000), f"its {WEIGHTS} has 5000 bytes of 10000"),
        (lambda p: invert(p / WEIGHTS, 4_000), f"its {WEIGHTS} is damaged"),
        (lambda p: invert(p / "trainer_state.json", 0, 1), "its trainer_state.json is damaged"),
        (lambda p: (p / RANDOM).unlink(), f"its {RANDOM} is missing"),
        (lambda p: (p / MANIFEST).write_text('{"model.saf'), f"its {MANIFEST} is damaged"),
        (lambda p: (p / MANIFEST).write_text('["model.safetensors"]'), f"its {MANIFEST} is damaged"),
        (lambda p: (p / MANIFEST).unlink(), "it was not finished"),
    ],
)
def test_from_a_damaged_checkpoint_a_run_goes_back_to_the_one_before_it_and_says_why(tmp_path, damage, said):
    older, newer = make(tmp_path, 10), make(tmp_path, 20)
    damage(newer)
    heard = []
    assert checkpoints.latest(tmp_path, heard.append) == older
    assert heard == [f"checkpoint-20 is not whole, {said}: going back to checkpoint-10"]
    assert not newer.exists(), "the run is to write it again"
    make(tmp_path, 20)
    assert checkpoints.latest(tmp_path, pytest.fail) == newer
    checkpoints.prune(tmp_path, CheckpointConfig(keep_last=2), {})
    kept = {"damaged-checkpoint-20.1"} if "finished" not in said else set()
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-20"} | kept, "what was whole once is kept"


def test_where_all_are_damaged_the_run_is_told_and_nothing_is_renamed(tmp_path):
    first, second = make(tmp_path, 10), make(tmp_path, 20)
    invert(first / "model.safetensors")
    (second / "complete.json").unlink()
    said = "checkpoint-20: it was not finished; checkpoint-10: its model.safetensors is damaged"
    with pytest.raises(RunDirectoryError, match=rf"no checkpoint .* is whole \({said}\): put back a copy"):
        checkpoints.latest(tmp_path)
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-20"}


def test_a_run_that_was_killed_while_it_wrote_its_first_checkpoint_begins_anew(tmp_path):
    (make(tmp_path, 10) / "complete.json").unlink()
    heard = []
    assert checkpoints.latest(tmp_path, heard.append) is None
    assert heard == ["checkpoint-10 was not finished, and there is none before it: training begins anew"]
    make(tmp_path, 10)
    checkpoints.prune(tmp_path, CheckpointConfig(), {})
    assert names(tmp_path) == {"checkpoint-10"}


def test_one_that_was_sealed_before_hashes_were_kept_is_known_by_its_sizes(tmp_path):
    path = make(tmp_path, 10)
    sizes = {"model.safetensors": 10_000, "trainer_state.json": 2}
    (path / "complete.json").write_text(json.dumps(sizes))
    assert checkpoints.latest(tmp_path) == path
    (path / "complete.json").write_text(json.dumps(sizes | {"trainer_state.json": 3}))
    assert checkpoints.damage(path) == "its trainer_state.json has 2 bytes of 3"


def test_what_else_lies_among_the_checkpoints_is_left_alone(tmp_path):
    strange = ("checkpoint-30-mine", "checkpoint-final", "my-checkpoint-40", "checkpoint-", "best-of-all")
    for name in strange:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-50").write_text("a file")
    for step in (1, 2):
        make(tmp_path, step)
        checkpoints.prune(tmp_path, CheckpointConfig(keep_last=1), {})
    assert checkpoints.latest(tmp_path, pytest.fail) == tmp_path / "checkpoint-2"
    assert checkpoints.newest_step(tmp_path) == 2
    assert names(tmp_path) == {*strange, "checkpoint-50", "checkpoint-2"}


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
