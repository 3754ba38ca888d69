"""A whole run in a process of its own, as a user starts it, watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gymexp.processes.access_keys import ENGINE, POLICY, RUN, Keys
from gymexp.rollout.rollout_files import read_outcomes

ROOT = Path(__file__).parent.parent
TINY = ROOT / "gymexp" / "assets" / "tiny"
STEPS = 4
BATCH = 16
SIZES = {"train_size": 64, "validation_size": 8}
OVERRIDES = [
    "experiment=quickstart",
    f"trainer.max_steps={STEPS}",
    "trainer.save_steps=2",
    f"trainer.per_device_train_batch_size={BATCH // 2}",
    "trainer.gradient_accumulation_steps=2",
    "trainer.num_generations=4",
    "evaluation.num_tasks=4",
    "evaluation.every_steps=2",
    *(f"env.{env}.data.{split}={size}" for env in ("sudoku", "workplace") for split, size in SIZES.items()),
]
UNEVALUATED = ["evaluation.before=false", "evaluation.after=false", "evaluation.every_steps=0"]
NO_WAY_OUT = dict.fromkeys(("http_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")  # a proxy that is not there
PATIENCE_S = 600


class Run:
    """A run in a process of its own. `descendants`: every process it ever had below it, as far as seen."""

    def __init__(
        self, directory: Path, *overrides: str, resume: bool = False, own: Path | None = None
    ) -> None:
        """own: a working directory with servers of the user's own, and options for these in its conf/."""
        self.directory = directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        self.output = directory.parent / f"{directory.name}.{len(list(directory.parent.iterdir()))}.txt"
        where = [f"resume={directory}"] if resume else [f"hydra.run.dir='{directory}'", *OVERRIDES]
        if own:
            where = ["--config-dir", str(own / "conf"), f"hydra.run.dir='{directory}'"]
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gymexp.train", *where, *overrides],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=own or ROOT,
                env=os.environ | NO_WAY_OUT,
                start_new_session=True,
            )
        self.watch()

    def watch(self) -> None:
        """Notes the processes below the run's from now on."""
        self.descendants: set[psutil.Process] = set()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while self.process.poll() is None:
            try:
                self.descendants.update(psutil.Process(self.process.pid).children(recursive=True))
            except psutil.NoSuchProcess:
                return
            time.sleep(0.1)

    @property
    def said(self) -> str:
        return self.output.read_text()

    def ended(self) -> int:
        """The exit code, once the run has ended."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the run did not end:\n{self.said}")

    def ended_cleanly(self) -> int:
        """The exit code of a run that has left no process, and no traceback on the screen."""
        code = self.ended()
        assert "Traceback" not in self.said, self.said
        assert self.left() == [], self.said
        return code

    def wait_for(self, holds: Callable[[], object]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not holds():
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                pytest.fail(f"the run has ended or hangs:\n{self.said}")
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: step in self.steps())

    def metrics(self) -> list[dict]:
        return metrics_of(self.directory)

    def status(self) -> dict:
        path = self.directory / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def steps(self) -> list[int]:
        return steps_of(self.directory)

    def rollouts(self, name: str) -> list[dict]:
        return rollouts_of(self.directory, name)

    @property
    def metrics_file(self) -> Path:
        return self.directory / "metrics.jsonl"

    def task_keys(self, step: int) -> list[str]:
        return task_keys_of(self.directory, step)

    def log(self, name: str) -> str:
        path = self.directory / "logs" / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def server(self, name: str) -> psutil.Process:
        """The process that writes the server's log."""
        return next(p for p in self.left() if self.writes(p, name))

    def writes(self, process: psutil.Process, name: str) -> bool:
        """Whether the process writes the log of this name."""
        log = str(self.directory / "logs" / f"{name}.log")
        with contextlib.suppress(OSError):  # it has ended
            return os.readlink(f"/proc/{process.pid}/fd/1") == log
        return False

    def keys(self) -> Keys:
        """Those of its servers, as the trainer's environment has them."""
        log = str(self.directory / "logs" / "trainer.log")
        environ = next(
            found
            for p in self.left()
            if os.readlink(f"/proc/{p.pid}/fd/1") == log and RUN in (found := p.environ())
        )
        return Keys(environ[RUN], environ[POLICY], environ[ENGINE])

    def left(self) -> list[psutil.Process]:
        return [p for p in self.descendants if alive(p)]

    def kill(self) -> None:
        """The end of a test, whatever happened in it."""
        for process in [*self.descendants, self.process]:
            if isinstance(process, subprocess.Popen) or alive(process):
                process.kill()
        self.process.wait()


def metrics_of(run: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def steps_of(run: Path) -> list[int]:
    """The training steps that were logged."""
    return [entry["step"] for entry in metrics_of(run) if "loss" in entry]


def rollouts_of(run: Path, name: str) -> list[dict]:
    return list(read_outcomes(run / "rollouts" / f"{name}.jsonl.zst"))


def task_keys_of(run: Path, step: int) -> list[str]:
    return [(o.get("rollout") or o)["task"]["key"] for o in rollouts_of(run, f"step-{step:06d}")]


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
