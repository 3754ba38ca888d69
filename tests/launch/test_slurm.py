"""Real Slurm: sweeps that are frozen, fail by name, and outlive preemption, time limits, their submitter."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import psutil
import pytest
from whole_run import ROOT, steps_of, task_keys_of

from gymexp.gym.install import site_packages
from gymexp.launch import watch

pytestmark = pytest.mark.slurm
PATIENCE_S = 420
SWEPT = ("trainer.num_generations", "trainer.learning_rate")
SMALL = [
    "experiment=quickstart",
    "env=[sudoku]",
    "env.sudoku.data.train_size=64",
    "env.sudoku.data.validation_size=8",
    "trainer.max_steps=3",
    "trainer.per_device_train_batch_size=8",
    "trainer.gradient_accumulation_steps=1",
    "trainer.num_generations=4",
    "evaluation.num_tasks=2",
    "evaluation.every_steps=0",
    "gym.start_timeout_s=400",  # three start at once
    "launcher.mem=4G",
    "launcher.time=30",
]


class Submitted:
    """`python -m gymexp.train launcher=slurm …` in a process of its own."""

    def __init__(self, sweep: Path, *overrides: str, project: Path = ROOT) -> None:
        self.sweep = sweep
        self.gates = project / "gates"
        sweep.parent.mkdir(parents=True, exist_ok=True)
        self._output = sweep.parent / f"{sweep.name}.txt"
        where = f"hydra.sweep.dir='{sweep}'"
        command = [sys.executable, "-m", "gymexp.train", "-m", "launcher=slurm", where, *SMALL, *overrides]
        with self._output.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, cwd=project)

    @property
    def said(self) -> str:
        return self._output.read_text()

    def wait_for(self, holds: Callable[[], object], why: str) -> None:
        until = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < until, f"{why}: not in time\n{self.said}"
            time.sleep(0.1)

    def ended(self) -> int:
        self.wait_for(lambda: self.process.poll() is not None, "the submitter's end")
        return self.process.returncode

    def entries(self) -> list[dict]:
        path = self.sweep / "sweep.json"
        return json.loads(path.read_text())["jobs"] if path.exists() else []

    def ids(self) -> list[str]:
        self.wait_for(lambda: self.entries() and all(e["job_id"] for e in self.entries()), "submission")
        return [entry["job_id"] for entry in self.entries()]

    def read(self, num: int, name: str) -> dict:
        path = self.sweep / str(num) / name
        return json.loads(path.read_text()) if path.exists() else {}

    def log(self, num: int) -> str:
        path = watch.log_of(self.sweep, self.ids()[num])
        return path.read_text() if path.exists() else ""

    def held_after_a_step(self, num: int) -> psutil.Process:
        """The job's trainer, stopped after its first step, where the job waits for it (`waiting_project`)."""
        self.wait_for(lambda: 1 in steps_of(self.sweep / str(num)), f"a step of job {num}")
        trainer = self.trainer(num)
        trainer.suspend()
        (self.gates / str(num)).unlink()
        assert steps_of(self.sweep / str(num)) == [1], "it has not waited"
        return trainer

    def trainer(self, num: int) -> psutil.Process:
        """The process that trains in the job's directory."""
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if "gymexp.training.process" in line and line[-1] == str(self.sweep / str(num)):
                return process
        pytest.fail(f"job {num} has no trainer\n{self.log(num)}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        if ids := [entry["job_id"] for entry in self.entries() if entry["job_id"]]:
            subprocess.run(["scancel", *ids], check=False)
            until = time.monotonic() + 30
            while set((watch.states(ids) or {}).values()) & watch.GOING_ON and time.monotonic() < until:
                time.sleep(0.2)


@pytest.fixture
def submitted(slurm, gym_python, tmp_path) -> Iterator[Callable[..., Submitted]]:
    """Submits to a directory that has to be quoted; what a failed test leaves of it is cancelled."""
    made: list[Submitted] = []

    def submit(*overrides: str, **more: Path) -> Submitted:
        made.append(Submitted(tmp_path / "with a space" / f"sweep{len(made)}", *overrides, **more))
        return made[-1]

    yield submit
    for one in made:
        one.end()


GATE = """

import asyncio, functools, os
from pathlib import Path


def behind_a_gate(verify):
    @functools.wraps(verify)
    async def wait(self, body):
        logs = Path(os.readlink("/proc/self/fd/1")).parent
        gate, metrics = Path(GATES) / logs.parent.name, logs.parent / "metrics.jsonl"
        while gate.exists() and metrics.exists() and '"loss"' in metrics.read_text():
            await asyncio.sleep(0.05)
        return await verify(self, body)
    return wait


ReasoningGymResourcesServer.verify = behind_a_gate(ReasoningGymResourcesServer.verify)
"""


def with_own_server(project: Path, gym_python: Path, code: str) -> Path:
    """A project with gymexp's sources and a copy of NeMo Gym's server that has more code at its end."""
    for name in ("gymexp", "conf"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    server = Path("resources_servers", "reasoning_gym")
    shutil.copytree(site_packages(gym_python) / server, project / server)
    app = project / server / "app.py"
    app.write_text(app.read_text().partition('if __name__ == "__main__"')[0] + code)
    return app


def waiting_project(project: Path, gym_python: Path, *jobs: int) -> Path:
    """A project in which these jobs, once they have trained a step, score nothing more until the test has
    taken their gate away: however slow the test is, they cannot end before it does something to them."""
    (project / "gates").mkdir(parents=True)
    for num in jobs:
        (project / "gates" / str(num)).touch()
    with_own_server(project, gym_python, GATE.replace("GATES", repr(str(project / "gates"))))
    return project


def collected(sweep: Path) -> list[dict[str, str]]:
    """The rows of `gymexp.sweep collect`."""
    command = [sys.executable, "-m", "gymexp.sweep", "collect", str(sweep)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    with (sweep / "results.csv").open() as file:
        return list(csv.DictReader(file))


def limit_job(job_id: str, minutes: int) -> None:
    said_by("scontrol", "update", f"jobid={job_id}", f"timelimit={minutes}")


def said_by(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_sweep_names_what_failed_and_goes_on_after_preemption_and_a_time_limit(
    submitted, gym_python, tmp_path
):
    """2x2x2 jobs, one a node. Each of three is disturbed; the one after it, of the same seed, is not."""
    swept = ["trainer.num_generations=2,4", "seed=0,1", "trainer.learning_rate=1e-4,2e-4"]
    preempted, limited, failing = 0, 2, 4
    project = waiting_project(tmp_path / "project", gym_python, preempted, limited, failing)
    where = ["launcher.partition=low", "launcher.cpus=9", "launcher.array_parallelism=3"]
    sweep = submitted(*swept, *where, project=project)
    ids = sweep.ids()

    held = sweep.held_after_a_step(limited)  # so that it cannot end before Slurm looks at its limit
    elapsed = int(time.time() - sweep.read(limited, "status.json")["began"]) // 60
    limit_job(ids[limited], elapsed + 2)  # less than launcher.signal_s away, and more than a minute
    sweep.held_after_a_step(preempted)  # Slurm's SIGTERM comes with SIGCONT
    node = sweep.read(preempted, "status.json")["node"]
    said_by("sbatch", "-p", "batch", "-w", node, "-c", "16", "-t", "5", "-o", "/dev/null", "--wrap", "true")
    sweep.wait_for(lambda: "ending: saving" in sweep.log(limited), "the warning of the time limit")
    limit_job(ids[limited], 30)
    held.resume()
    sweep.held_after_a_step(failing).kill()

    assert sweep.ended() == 1, sweep.said
    named = sweep.said.split("error: 1 of 8 jobs failed\n")[-1]
    called = f"job {failing} (trainer.num_generations=4 seed=0 trainer.learning_rate=0.0001)"
    assert named.startswith(f"{called} failed: trainer was ended by SIGKILL.")
    assert f"log: {watch.log_of(sweep.sweep, ids[failing])}\n" in named

    for num, (generations, seed, rate) in enumerate(product("24", "01", ("0.0001", "0.0002"))):
        keys = {"trainer.num_generations": generations, "seed": seed, "trainer.learning_rate": rate}
        assert sweep.entries()[num]["swept"] == keys
        assert sweep.read(num, "status.json")["restarts"] == (1 if num in (preempted, limited) else 0)
        result = sweep.read(num, "result.json")
        if num == failing:
            assert "SIGKILL" in result["error"]
            continue
        assert (result["step"], result["stopped"]) == (3, False)
        assert len(result["held_out"]["sudoku"]["reward"]) == 2, "before and after"
        assert steps_of(sweep.sweep / str(num)) == [1, 2, 3]
    rows = collected(sweep.sweep)
    runs = [row for row in rows if row["kind"] == "run"]
    assert [row["job"] for row in runs] == [str(num) for num in range(8)]
    assert [row["state"] for row in runs] == ["failed" if num == failing else "finished" for num in range(8)]
    assert "SIGKILL" in runs[failing]["why"]
    of_rates = [row for row in rows if row["kind"] != "run"]
    assert sorted(row["n"] for row in of_rates) == ["1", "2", "2", "2"], "seeds, without the one that failed"
    for row in of_rates:
        same = [r for r in runs if r["state"] == "finished" and all(r[k] == row[k] for k in SWEPT)]
        mean = sum(float(r["sudoku_after"]) for r in same) / len(same)
        assert float(row["sudoku_after"]) == pytest.approx(mean)

    for num in (preempted, limited):
        disturbed, undisturbed = sweep.sweep / str(num), sweep.sweep / str(num + 1)
        for name in ("train.jsonl", "validation.jsonl", "mix.json"):
            assert (disturbed / "data" / name).read_bytes() == (undisturbed / "data" / name).read_bytes()
        for step in (1, 2, 3):
            assert task_keys_of(disturbed, step) == task_keys_of(undisturbed, step)

    said = said_by(sys.executable, "-m", "gymexp.sweep", "resubmit", str(sweep.sweep))
    assert f"job {failing} failed: trainer was ended by SIGKILL" in said and "; begins anew" in said
    assert said.count(" submitted as ") == 1
    assert [entry["job_id"] for entry in sweep.entries()] != ids, "the newest submission's"
    sweep.wait_for(lambda: sweep.read(failing, "result.json").get("step") == 3, "the job that failed")
    assert steps_of(sweep.sweep / str(failing)) == [1, 2, 3]
    states = [row["state"] for row in collected(sweep.sweep) if row["kind"] == "run"]
    assert states == ["finished"] * 8


def test_a_waiting_job_runs_what_was_submitted_and_needs_no_submitter(submitted, gym_python, tmp_path):
    """Held in the queue while its submitter is killed, and its project's code, configuration and own server
    change."""
    project = tmp_path / "project"
    app = with_own_server(project, gym_python, "\nprint('the server as it was')\n")
    changes = ["trainer.max_steps=1", "evaluation.before=false", "evaluation.after=false"]
    sweep = submitted(*changes, "+hydra.launcher.additional_parameters.hold=true", project=project)
    (job_id,) = sweep.ids()
    sweep.process.send_signal(signal.SIGKILL)
    sweep.process.wait()
    (project / "gymexp" / "train.py").write_text("raise SystemExit('edited')\n")
    app.write_text("raise SystemExit('edited')\n")
    tiny = project / "conf" / "model" / "tiny.yaml"
    tiny.write_text(tiny.read_text().replace("learning_rate: 2e-4", "learning_rate: 0.5"))
    assert "0.5" in tiny.read_text()
    said_by("scontrol", "release", job_id)
    sweep.wait_for(lambda: sweep.read(0, "status.json").get("outcome"), "the run's end")
    assert sweep.read(0, "status.json")["outcome"] == "finished", sweep.log(0)
    sweep.wait_for(lambda: watch.states([job_id])[job_id] not in watch.GOING_ON, "the job's end")
    (row,) = (row for row in collected(sweep.sweep) if row["kind"] == "run")
    assert (row["state"], row["step"]) == ("finished", "1"), "though its submitter was killed"
    assert "learning_rate: 0.0002" in (sweep.sweep / "0" / "config.yaml").read_text()
    logs = (path.read_text() for path in (sweep.sweep / "0" / "logs").glob("*.log"))
    assert any("the server as it was" in log for log in logs)
    assert "edited" not in (sweep.sweep / "0" / "code" / "gymexp" / "train.py").read_text()


def test_a_cancelled_job_is_named_and_stays_cancelled(submitted):
    sweep = submitted("seed=0,1", "launcher.array_parallelism=1")
    running, waiting = sweep.ids()
    sweep.wait_for(lambda: sweep.read(0, "status.json").get("services", {}).get("trainer"), "a trainer")
    said_by("scancel", running, waiting)
    assert sweep.ended() == 1
    for num, job_id in enumerate((running, waiting)):
        assert (
            f"job {num} (seed={num}) failed: job {job_id} ended without a result; Slurm says CANCELLED"
            in (sweep.said)
        )
    assert watch.states([running, waiting]) == {running: "CANCELLED", waiting: "CANCELLED"}
    assert sweep.read(0, "status.json")["restarts"] == 0


def test_a_mistake_in_one_job_submits_none_and_leaves_nothing(submitted):
    sweep = submitted("trainer.learning_rate=1e-4,fast,2e-4", "trainer.num_generations=2,3")
    assert sweep.ended() == 1
    assert "error: nothing was started: 4 of 6 jobs are wrong\n" in sweep.said
    wrong = "trainer.num_generations=3 must divide the generation batch of 8 rollouts"
    assert (
        f"job 3 (trainer.num_generations=3 trainer.learning_rate=0.0001) and 2 more:\n{wrong}" in sweep.said
    )
    wrong = "trainer.learning_rate must be of type float, got 'fast'"
    assert f"job 1 (trainer.num_generations=2 trainer.learning_rate=fast):\n{wrong}" in sweep.said
    assert not sweep.sweep.exists()


def test_a_partition_that_is_not_there_is_sbatchs_to_say(submitted):
    sweep = submitted("launcher.partition=none_such")
    assert sweep.ended() == 1
    assert "error: sbatch did not take the jobs: " in sweep.said and "invalid partition" in sweep.said
    assert not sweep.sweep.exists()


def test_a_dry_run_prints_the_script_and_leaves_nothing(submitted):
    sweep = submitted("launcher.dry_run=true", "launcher.gpus=2", "launcher.time='1-12'", "seed=0,1")
    assert sweep.ended() == 0
    for line in (
        "--array=0-1%2",
        "--gpus-per-node=2",
        "--mem=4G",
        "--time=1-12",
        "--signal=USR2@120",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in sweep.said
    assert sweep.entries() == [] and not sweep.sweep.exists()
