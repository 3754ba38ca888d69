"""The run at each tracker: its names, its group, its rollouts, and that a resumed run continues it."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gymexp.config.schema import ModelConfig, RunConfig, TrackerConfig
from gymexp.rollout.outcome import Completed, Failed, Rollout, Task, Turn
from gymexp.training.rollout_sample import Chosen
from gymexp.training.tracker_runs import Place, flatten, open_run

TASK = Task("sudoku/1", "sudoku", "a", {"responses_create_params": {"input": "Solve it."}})
ANSWER = {"type": "message", "role": "assistant", "content": "1 2 3 4"}
CHOSEN = [
    Chosen("best", Completed(Rollout(TASK, [Turn([1], [2, 3], [-0.5, -0.1])], 0.25, [ANSWER])), -0.75),
    Chosen("failed", Failed(TASK, "timeout", "too slow")),
]
DEFINES: Any = {"define_metric": lambda *_, **__: None}
# A stand-in for the package: what it gets is a line of trackio.jsonl in the working directory.
TRACKIO = """
import json

def write(**facts):
    with open("trackio.jsonl", "a") as file:
        file.write(json.dumps(facts) + "\\n")

class Trace:
    def __init__(self, messages, metadata):
        self.both = [messages, metadata]

class Run:
    def log(self, metrics, step):
        plain = {k: [t.both for t in v] if isinstance(v, list) else v for k, v in metrics.items()}
        write(log=plain, step=step)

    def finish(self):
        write(finish=True)

def init(**options):
    write(init=options)
    return Run()

def freeze(**options):
    write(freeze=options)
"""


def config(kind: str, **more: Any) -> RunConfig:
    model = ModelConfig(path="https://user:hunter2hunter2@example.org/model")
    return RunConfig(
        name="n", model=model, tracker=TrackerConfig(kind=kind, project="p", mode="offline"), **more
    )


def play(kind: str, directory: Path, step: int | None = None, **more: Any) -> None:
    """Opens the run, sends one entry and two samples, and ends it."""
    run = open_run(config(kind, **more), Place.of(directory, "n", step))
    assert run
    run.log((step or 0) + 1, {"sudoku/reward": 0.5, "eval_sudoku/reward": 0.25})
    run.log_rollouts(2, "step-000002", CHOSEN)
    run.log_rollouts(2, "eval-000002", CHOSEN)
    run.finish(failed=False)


@pytest.fixture
def job(tmp_path):
    """The directory of a sweep's job."""
    directory = tmp_path / "2026-01-01" / "3"
    directory.mkdir(parents=True)
    (directory.parent / "sweep.json").write_text("{}")
    return directory


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package `trackio` that writes what it gets; returns a reader of it."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.chdir(tmp_path)
    yield lambda: [json.loads(line) for line in (tmp_path / "trackio.jsonl").read_text().splitlines()]
    sys.modules.pop("trackio", None)


def test_a_run_without_a_tracker_has_none_and_a_sweeps_job_is_called_after_both(job, tmp_path):
    assert open_run(RunConfig(), Place.of(tmp_path, "n", None)) is None
    assert Place.of(job, "n", 4) == Place(job, "n 2026-01-01/3", "n 2026-01-01", 4)
    assert Place.of(tmp_path, "n", None) == Place(tmp_path, f"n {tmp_path.name}", None, None)


def test_trackio_gets_names_group_and_traces_and_continues_a_resumed_run(job, stand_in):
    play("trackio", job)
    play("trackio", job, 8)
    first, numbers, step, evaluation, end, second, *_ = stand_in()
    (options, resumed) = (first["init"], second["init"])
    assert (options["project"], options["group"]) == ("p", "n 2026-01-01")
    assert options["name"].startswith("n 2026-01-01/3 ") and options["name"] == resumed["name"]
    assert (options["resume"], resumed["resume"]) == ("never", "allow")
    assert options["config"]["model"]["path"] == "***"
    assert "hunter2" not in json.dumps(stand_in())
    assert numbers == {"log": {"sudoku/reward": 0.5, "eval_sudoku/reward": 0.25}, "step": 1}
    conversation, facts = step["log"]["rollouts"][0]
    assert [m["content"] for m in conversation] == ["Solve it.", "1 2 3 4"]
    assert (facts["reward"], facts["env"], facts["chosen"], facts["step"]) == (0.25, "sudoku", "best", 2)
    assert step["log"]["rollouts"][1][1]["outcome"] == "failed (timeout)"
    assert [facts["advantage"] for _, facts in step["log"]["rollouts"]] == [-0.75, None]
    assert "advantage" not in evaluation["log"]["eval_rollouts"][0][1], "nothing trains on held-out ones"
    assert list(evaluation["log"]) == ["eval_rollouts"] and end == {"finish": True}


def test_a_space_of_trackio_is_frozen_at_the_end_as_its_arguments_say(tmp_path, stand_in):
    play("trackio", tmp_path, trainer={"trackio_space_id": "me/space"})
    play("trackio", tmp_path, trainer={"trackio_space_id": "me/space", "trackio_static_space_id": False})
    frozen = [line["freeze"] for line in stand_in() if "freeze" in line]
    assert frozen == [{"space_id": "me/space", "project": "p", "new_space_id": None}]


def test_wandb_offline_keeps_names_group_tables_and_identity(job, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    play("wandb", job)
    (directory,) = job.glob("wandb/offline-run-*")
    identity = (job / "wandb_run_id").read_text()
    assert directory.name.endswith(f"-{identity}")
    (file,) = directory.glob("*.wandb")
    until = time.monotonic() + 30
    while file.stat().st_size < 100 and time.monotonic() < until:
        time.sleep(0.1)  # wandb's own process writes it after the run has ended
    content = file.read_bytes()
    for text in (
        "sudoku/reward",
        "eval_sudoku/reward",
        "rollouts/eval-000002",
        "n 2026-01-01/3",
        "n 2026-01-01",
    ):
        assert bytes([len(text)]) + text.encode() in content, f"{text}, as a field of a protobuf record"
    assert b"step-000002" not in content, "only evaluations"
    (table,) = (json.loads(path.read_text()) for path in directory.rglob("*.table.json"))
    assert len(table["data"]) == 2 and "user: Solve it.\n\nassistant: 1 2 3 4" in table["data"][0]
    everything = b"".join(path.read_bytes() for path in job.rglob("*") if path.is_file())
    assert b"hunter2" not in everything

    opened: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.init", lambda **options: opened.append(options) or SimpleNamespace(**DEFINES))
    open_run(config("wandb"), Place.of(job, "n", 8))
    assert (opened[0]["id"], opened[0]["resume"], opened[0]["mode"]) == (identity, "allow", "offline")


def in_a_process(kind: str, job: Path, tmp_path: Path, step: int | None, **environ: str) -> None:
    """Each package keeps state of a process, as of the current run."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        f"import test_tracker_runs as here; here.play({kind!r}, Path(sys.argv[2]), {step})"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(job)],
        check=True,
        env=os.environ | environ,
        cwd=tmp_path,
        timeout=120,
    )


@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="needs trackio")
def test_the_real_trackio_has_one_run_with_metrics_traces_and_group(job, tmp_path):
    for step in (None, 8):
        in_a_process("trackio", job, tmp_path, step, TRACKIO_DIR=str(tmp_path / "trackio"))
    (database,) = (tmp_path / "trackio").glob("p*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics").fetchall()
        traces = connection.execute("select count(*) from traces").fetchone()
        configs = connection.execute("select config from configs").fetchall()
    assert {name for name, *_ in rows} == {(job / "trackio_run_id").read_text()}
    found = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [step for step, metrics in found if metrics.get("sudoku/reward") == 0.5] == [1, 9]
    assert traces == (8,) and "n 2026-01-01" in str(configs) and "hunter2" not in str(configs)


@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="needs mlflow")
def test_the_real_mlflow_has_one_run_with_metrics_tables_and_tag(job, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for step in (None, 8):
        in_a_process("mlflow", job, tmp_path, step, MLFLOW_TRACKING_URI=uri)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("p")
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (job / "mlflow_run_id").read_text()
    assert (run.info.status, run.info.run_name) == ("FINISHED", "n 2026-01-01/3")
    assert run.data.tags["sweep"] == "n 2026-01-01" and "hunter2" not in str(run.data.params)
    assert [m.step for m in client.get_metric_history(run.info.run_id, "sudoku/reward")] == [1, 9]
    assert [f.path for f in client.list_artifacts(run.info.run_id, "rollouts")] == [
        "rollouts/eval-000002.json"
    ]


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="needs tensorboard")
def test_tensorboard_has_the_names_and_forgets_what_a_resumed_run_repeats(job):
    for step in (None, 0):
        play("tensorboard", job, step)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(job / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"sudoku/reward", "eval_sudoku/reward"}
    assert [event.step for event in events.Scalars("sudoku/reward")] == [1]


def test_a_configuration_becomes_flat_parameters():
    assert flatten({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": "1", "a.c": "[2]", "d": "None"}
