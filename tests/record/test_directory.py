"""A run directory holds one run, and says what it was."""

from __future__ import annotations

import errno
import fcntl
import json
import os

import pytest

from gymexp.config.load import from_yaml, resumed
from gymexp.config.schema import DataConfig, EnvConfig, ModelConfig, RunConfig
from gymexp.errors import ConfigError, RunDirectoryError
from gymexp.files import append_line, read_json, read_lines
from gymexp.record.code_snapshot import snapshot
from gymexp.record.directory import RunDirectory, latest_run

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
    with pytest.raises(RunDirectoryError, match=r"flock failed: Function not implemented.*output_dir"):
        RunDirectory.claim(tmp_path)


def test_resuming_what_is_no_run_directory_says_so(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"has no config\.yaml"):
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


@pytest.mark.parametrize(
    ("result", "max_steps", "finished"),
    [
        ({}, 4, False),
        ({"error": "a server failed"}, 4, False),
        ({"step": 4, "stopped": True}, 4, False),
        ({"step": 2, "stopped": False, "pruned": "below the median"}, 4, False),
        ({"step": 4, "stopped": False}, 4, True),
        ({"step": 4, "stopped": False}, None, True),
        ({"step": 4, "stopped": False}, -1, True),
        ({"step": 4, "stopped": False}, 5, False),
    ],
)
def test_a_run_is_finished_unless_it_is_told_to_go_further(tmp_path, result, max_steps, finished):
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert RunDirectory(tmp_path).is_finished(max_steps) is finished


def test_a_run_cannot_be_told_to_end_before_where_it_is(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"step": 4, "stopped": False}))
    with pytest.raises(RunDirectoryError, match=r"trainer\.max_steps must be above 4, .* got 3"):
        RunDirectory(tmp_path).is_finished(3)


def test_how_far_a_run_goes_is_written_down_anew(tmp_path):
    run = RunDirectory.claim(tmp_path)
    data = DataConfig(source="jsonl", train_file="t.jsonl", validation_file="v.jsonl")
    config = RunConfig(
        name="m", model=ModelConfig(name="m", path="p"), env={"e": EnvConfig("c", "a", data=data)}
    )
    run.describe(config, ["env=[e]"])
    config = from_yaml(run.config)
    run.go_on_with(config, ["resume=x"])
    assert from_yaml(run.config) == config, "nothing new was said"
    further = resumed(run.config, "x", ["resume=x", "trainer.max_steps=9"])
    run.go_on_with(further, ["resume=x", "trainer.max_steps=9"])
    assert from_yaml(run.config).trainer["max_steps"] == 9 and from_yaml(run.config).resume is None
    assert (tmp_path / "overrides.yaml").read_text() == "- env=[e]\n- trainer.max_steps=9\n"
    with pytest.raises(ConfigError, match=r"^trainer\.learning_rate must be left out with resume=…"):
        resumed(run.config, "x", ["resume=x", "trainer.learning_rate=1"])


def test_the_latest_run_is_the_one_that_was_written_to_last(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"resume=latest must find a run in "):
        latest_run(tmp_path)
    for at, name in enumerate(("a/2026-01-02_10-00-00", "b/2026-01-01_10-00-00", "a/2026-01-03_10-00-00")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
        os.utime(tmp_path / name / "config.yaml", (at, at))
    status = tmp_path / "b/2026-01-01_10-00-00" / "status.json"
    status.write_text("{}")
    assert latest_run(tmp_path) == status.parent


@pytest.mark.parametrize(("command", "other"), [("train", "evaluate"), ("evaluate", "train")])
def test_a_directory_is_resumed_by_the_command_that_made_it_alone(tmp_path, command, other):
    (tmp_path / "config.yaml").write_text("")
    if other == "evaluate":
        (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(
        RunDirectoryError, match=rf"is of gymexp\.{other}; go on with: python -m gymexp\.{other} "
    ):
        RunDirectory.reopen(tmp_path, command)
