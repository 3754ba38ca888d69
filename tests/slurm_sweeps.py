"""Sweeps that are submitted to a real Slurm, and what of them can be held up and looked at."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from whole_run import ROOT, steps_of

from gymexp.gym.install import site_packages
from gymexp.sweep import watch

PATIENCE_S = 420
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
    """`python -m gymexp.train launcher=slurm …`, or another command's, in a process of its own."""

    def __init__(
        self,
        sweep: Path,
        *overrides: str,
        project: Path = ROOT,
        command: str = "train",
        multirun: bool = True,
    ) -> None:
        self.sweep = sweep
        self.gates = project / "gates"
        sweep.parent.mkdir(parents=True, exist_ok=True)
        self._output = sweep.parent / f"{sweep.name}.txt"
        where = f"hydra.sweep.dir='{sweep}'"
        small = SMALL if command == "train" else []
        flags = ["-m"] if multirun else []
        words = [
            sys.executable,
            "-m",
            f"gymexp.{command}",
            *flags,
            "launcher=slurm",
            where,
            *small,
            *overrides,
        ]
        with self._output.open("w") as out:
            self.process = subprocess.Popen(words, stdout=out, stderr=out, cwd=project)

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
            if "gymexp.training.trainer_process" in line and line[-1] == str(self.sweep / str(num)):
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
