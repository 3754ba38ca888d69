"""A sweep's directory: jobs as they were checked, what differs between them, nothing of others removed."""

from __future__ import annotations

import json

import pytest

from gymexp.config.schema import EnvConfig, ModelConfig, RunConfig
from gymexp.errors import RunDirectoryError
from gymexp.sweep.freeze import FrozenJob, freeze, read_job, read_sweep, swept_of, take_back, write_sweep

CONFIG = RunConfig(
    name="n",
    model=ModelConfig(name="m", path="p"),
    env={"sudoku": EnvConfig(config_path="c", agent="a")},
    trainer={"learning_rate": 1e-6, "deepspeed": {"zero_optimization": {"stage": 3}}},
)
CONFIG.env["sudoku"].data.source = "generate"
CONFIG.env["sudoku"].data.generator = "reasoning_gym"
CONFIG.env["sudoku"].data.train_size = CONFIG.env["sudoku"].data.validation_size = 8


def test_a_frozen_job_is_read_as_it_was_and_its_sweep_says_how_it_came_about(tmp_path):
    jobs = {num: FrozenJob(CONFIG, ["env=[sudoku]", f"seed={num}"]) for num in (0, 1)}
    freeze(tmp_path / "s", "slurm", jobs, {"gres": "gpu:h100:8"})
    assert read_job(tmp_path / "s" / "1") == jobs[1]
    said = read_sweep(tmp_path / "s")
    assert said["sbatch"] == {"gres": "gpu:h100:8"}
    assert [(job["num"], job["swept"], job["job_id"]) for job in said["jobs"]] == [
        (0, {"seed": "0"}, None),
        (1, {"seed": "1"}, None),
    ]
    assert (tmp_path / "s" / "code" / "gymexp" / "assets" / "tiny" / "config.json").exists(), (
        "jobs run from it"
    )


def test_a_second_batch_joins_the_sweep_and_a_number_is_not_taken_twice(tmp_path):
    freeze(tmp_path, "slurm", {0: FrozenJob(CONFIG, ["seed=0"])}, {})
    freeze(tmp_path, "slurm", {1: FrozenJob(CONFIG, ["seed=5"])}, {})
    assert [job["swept"] for job in read_sweep(tmp_path)["jobs"]] == [{"seed": "0"}, {"seed": "5"}]
    with pytest.raises(RunDirectoryError, match=r"holds a sweep already, with job 1: choose another"):
        freeze(tmp_path, "slurm", {1: FrozenJob(CONFIG, ["seed=6"])}, {})


def test_swept_is_what_differs_also_where_a_job_lacks_it():
    jobs = [["a=1", "+b=2", "c=[x,y]"], ["a=1", "b=3", "c=[x,y]"], ["a=1", "c=[x,y]"]]
    assert swept_of(jobs) == [{"b": "2"}, {"b": "3"}, {}]
    assert swept_of([["a=1"]]) == [{}]


def test_what_was_not_submitted_is_taken_back_and_a_users_file_is_not(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "notes.txt").touch()
    freeze(tmp_path, "slurm", {num: FrozenJob(CONFIG, []) for num in (0, 1)}, {})
    take_back(tmp_path, [0, 1])
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["0", "0/notes.txt"]


def test_a_sweep_with_a_submitted_job_is_not_taken_back(tmp_path):
    freeze(tmp_path, "slurm", {0: FrozenJob(CONFIG, [])}, {})
    said = read_sweep(tmp_path)
    said["jobs"][0]["job_id"] = "7"
    write_sweep(tmp_path, said)
    take_back(tmp_path, [0])
    assert read_job(tmp_path / "0").config == CONFIG and read_sweep(tmp_path) == said


def test_what_is_no_sweep_or_of_another_schema_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match="must be a sweep's directory"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(
        RunDirectoryError, match=r"must be of schema 2, got 99: .*PYTHONPATH=\S+code python -m gymexp.sweep"
    ):
        read_sweep(tmp_path)
