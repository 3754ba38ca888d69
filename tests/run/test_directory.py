"""A run directory holds one run, and says what it was."""

from __future__ import annotations

import errno
import fcntl
import json

import pytest

from gymexp.config import EnvConfig, ModelConfig, RunConfig
from gymexp.errors import RunDirectoryError
from gymexp.run.directory import RunDirectory, append_line, read_json, read_lines, snapshot

CONFIG = RunConfig(model=ModelConfig(name="m", path="p"), env={"e": EnvConfig(config_path="c", agent="a")})


def test_a_claimed_directory_describes_the_run(tmp_path):
    run = RunDirectory.claim(tmp_path / "run")
    run.describe(CONFIG, ["env=[e]"])
    assert "name: m" in run.config.read_text()
    assert (run.path / "overrides.yaml").read_text() == "- env=[e]\n"
    assert "trl" in (run.path / "versions.txt").read_text()
    assert (run.path / "code" / "gymexp" / "train.py").exists()
    assert (run.path / "code" / "conf" / "train.yaml").exists()


def test_a_second_run_into_the_same_directory_is_refused(tmp_path):
    RunDirectory.claim(tmp_path).describe(CONFIG, [])
    with pytest.raises(RunDirectoryError, match=r"holds a run already.*resume="):
        RunDirectory.claim(tmp_path)


def test_a_directory_whose_run_goes_on_cannot_be_resumed(tmp_path):
    held = RunDirectory.claim(tmp_path)
    held.describe(CONFIG, [])
    with pytest.raises(RunDirectoryError, match="still going on"):
        RunDirectory.reopen(tmp_path)
    held._lock_file.close()
    assert RunDirectory.reopen(tmp_path).config.exists()


def test_a_file_system_without_locks_is_named_with_what_to_do(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunDirectoryError, match=r"flock says: Function not implemented.*output_dir"):
        RunDirectory.claim(tmp_path)


def test_resuming_what_is_no_run_directory_says_so(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"holds no config\.yaml"):
        RunDirectory.reopen(tmp_path)


def test_of_lines_what_is_whole_is_read_and_what_comes_next_stands_on_a_line_of_its_own(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == read_lines(path / "deeper") == []
    append_line(path, {"step": 1})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "rew')
    assert read_lines(path) == [{"step": 1}]
    append_line(path, {"step": 3})
    assert read_lines(path) == [{"step": 1}, {"step": 3}]
    with path.open("ab") as file:
        file.write(b"\xff\x00\n[4]\n\n")
    append_line(path, {"step": 5})
    assert read_lines(path) == [{"step": 1}, {"step": 3}, {"step": 5}]


@pytest.mark.parametrize("content", [b"", b'{"step": 2, "stop', b"\xff\xfe", b"[1]", b"\0" * 100])
def test_a_damaged_file_of_an_object_is_as_one_that_is_not_there(tmp_path, content):
    path = tmp_path / "result.json"
    assert read_json(path) == {}
    path.write_bytes(content)
    assert read_json(path) == {}
    path.write_text(json.dumps({"step": 2}))
    assert read_json(path) == {"step": 2}


def test_a_folder_with_files_of_the_users_own_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "data").mkdir()
    mine = tmp_path / "data" / "train.jsonl"
    mine.write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"a new or an empty folder.*has data: choose another"):
        RunDirectory.claim(tmp_path)
    assert mine.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["data"]


def test_what_a_job_has_before_its_run_begins_and_what_an_attempt_left_are_no_hindrance(tmp_path):
    for name in ("job.yaml", "starts.jsonl", "result.json"):
        (tmp_path / name).write_text("{}")
    claimed = RunDirectory.claim(tmp_path)
    (claimed.data / "train.jsonl").write_text("prepared")
    claimed._lock_file.close()  # it ended before it was described
    assert RunDirectory.claim(tmp_path).path == tmp_path


def test_without_git_on_the_path_a_run_is_described_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    snapshot(tmp_path / "code")
    assert (tmp_path / "code" / "gymexp" / "train.py").exists()
    assert not list((tmp_path / "code").glob("git-*"))
