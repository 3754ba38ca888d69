"""Directories are tried out, and a run's checkpoints counted in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gymexp.config.schema import ModelConfig, RunConfig
from gymexp.doctor import disks
from gymexp.doctor.disk_probe import probe
from gymexp.doctor.finding import CommandResult, Subject


def subject(path: Path) -> Subject:
    return Subject(RunConfig(model=ModelConfig("own", str(path))))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """1 TB of weights in bfloat16, none of which lies on the disk."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    with (path / "model.safetensors").open("wb") as file:
        file.truncate(10**12)
    return path


def test_a_directory_that_is_to_be_made_is_tried_out_above_and_nothing_is_left(tmp_path):
    found = probe(tmp_path / "not" / "there")
    assert found["where"] == str(tmp_path) and found["error"] is None
    assert found["free"] > 0 and found["write_s"] > 0 and found["type"] != "?"
    assert not list(tmp_path.iterdir())


def test_a_directory_that_nobody_may_write_to_is_a_failure(monkeypatch, model):
    monkeypatch.setenv("GYMEXP_CACHE", "/proc/gymexp")
    by_name = {one.name: one for one in disks.look(subject(model))}
    found = by_name["disk: cache"]
    assert found.level == "fail" and "(proc)" in found.text and "cannot be written to" in found.text
    assert "GYMEXP_CACHE" in found.fix


def test_a_model_whose_checkpoints_do_not_fit_is_a_failure(monkeypatch, tmp_path, model):
    monkeypatch.chdir(tmp_path)
    assert disks.checkpoint_bytes(subject(model).config.model) == 6 * 10**12  # float32 with both moments
    found = {one.name: one for one in disks.look(subject(model))}["disk: outputs"]
    assert found.level == "fail" and "a checkpoint of this model takes about 5587.9 GiB" in found.text


def test_a_file_system_that_hangs_is_told_as_that(monkeypatch, model):
    monkeypatch.setattr(disks, "run_command", lambda *_, timeout_s: CommandResult(None, "", "no answer"))
    assert {one.level for one in disks.look(subject(model))} == {"fail"}
    assert all("the file system hangs" in one.text for one in disks.look(subject(model)))
