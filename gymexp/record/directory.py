"""The run directory: claimed once, self-describing, replaced file by file, never written by two.

outputs/<name>/<date_time>/
    config.yaml overrides.yaml versions.txt code/ data/ checkpoints/ logs/<process>.log
    rollouts/step-000001.jsonl.zst metrics.jsonl timeline.jsonl status.json result.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from gymexp.config.load import to_yaml
from gymexp.config.schema import RunConfig
from gymexp.errors import RunDirectoryError
from gymexp.files import append_line, in_words, read_json, replace_file
from gymexp.printable import printable_in
from gymexp.record.snapshot import _versions, snapshot

_LOCK = ".lock"
# What Hydra, a sweep or a job has written to a run's directory before the run begins.
_BEFORE_A_RUN = {
    ".hydra",
    "job.yaml",
    "trial.json",
    "starts.jsonl",
    "lead.json",
    "status.json",
    "result.json",
}


def latest_run(outputs: Path) -> Path:
    """The run below outputs/<name>/ that was written to last. Raises RunDirectoryError if there is none."""
    runs = [config.parent for config in outputs.glob("*/*/config.yaml")]
    if not runs:
        raise RunDirectoryError(
            f"resume=latest must find a run in {outputs.absolute()}/<name>/<date_time>, but there is none: "
            "say resume=… with its directory"
        )
    return max(runs, key=lambda run: max(file.stat().st_mtime for file in run.glob("*.*")))


class Ended(StrEnum):
    """How a start of a run ended, as status.json has it under `ended`, beside the text of `outcome`."""

    FINISHED = "finished"
    STOPPED = "stopped"  # it was asked to end
    FAILED = "failed"
    REQUEUED = "requeued"  # by its Slurm job, which starts again


def is_whole(result: Mapping[str, Any]) -> bool:
    """Whether a result.json is that of a run which trained to its end, or was pruned."""
    return "step" in result and not result["stopped"]


def failure_of(result: Mapping[str, Any], otherwise: str) -> str | None:
    """Why a run that is over came to no good end. otherwise: the word on one that left no result.json."""
    return None if is_whole(result) else result.get("error") or otherwise


class RunDirectory:
    """One run's directory, held by this process until it ends (an advisory lock, so that a crash leaves it
    free).

    `claim`, then the tasks to `data`, then `describe`: a directory that has its config.yaml has all that a
    run needs to go on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self.data = path / "data"
        self.checkpoints = path / "checkpoints"
        self.rollouts = path / "rollouts"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.timeline = path / "timeline.jsonl"
        self.status = path / "status.json"
        self.result = path / "result.json"
        self._refused: OSError | None = None  # what the file system said of the last try to write here

    @classmethod
    def claim(cls, path: Path) -> RunDirectory:
        """Make a new run's directory. Raises RunDirectoryError if it holds a run already, or files of the
        user's own."""
        run = cls(path)
        if run.config.exists():
            raise RunDirectoryError(
                f"{path} holds a run already: go on with it by resume={path}, or choose another output_dir"
            )
        foreign = [] if run._was_claimed() else sorted({p.name for p in _entries(path)} - _BEFORE_A_RUN)
        if foreign:
            raise RunDirectoryError(
                "output_dir must be a new or an empty folder, as a run writes over what has its names, "
                f"but {path} has {', '.join(foreign[:5])}: choose another output_dir (hydra.run.dir=…)"
            )
        for directory in (run.logs, run.data, run.checkpoints, run.rollouts):
            directory.mkdir(parents=True, exist_ok=True)
        run._lock()
        return run

    def describe(self, config: RunConfig, overrides: Sequence[str]) -> None:
        """Write down what is run. config.yaml is the last file: it is what makes this a run."""
        snapshot(self.path / "code")
        (self.path / "versions.txt").write_text(_versions())
        (self.path / "overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides))
        replace_file(self.config, to_yaml(config))

    def go_on_with(self, config: RunConfig, overrides: Sequence[str]) -> None:
        """Write down that a run goes on, perhaps further than it was meant to."""
        if more := [override for override in overrides if not override.startswith("resume=")]:
            with (self.path / "overrides.yaml").open("a") as file:
                file.write("".join(f"- {o}\n" for o in more))
            replace_file(self.config, to_yaml(dataclasses.replace(config, resume=None)))

    def is_finished(self, max_steps: int | None) -> bool:
        """Whether the run came to its end, and is not told to go on beyond it. Raises RunDirectoryError for
        an end that it has passed."""
        result = self.read_result()
        if not is_whole(result) or result.get("pruned"):
            return False
        if max_steps is not None and 0 < max_steps < result["step"]:
            raise RunDirectoryError(
                f"trainer.max_steps must be above {result['step']}, the steps that {self.path} has trained, "
                f"got {max_steps}"
            )
        return not max_steps or max_steps <= result["step"]

    @classmethod
    def reopen(cls, path: Path) -> RunDirectory:
        """Hold the directory of a run that is to go on."""
        run = cls(path)
        if not run.config.exists():
            raise RunDirectoryError(f"resume must name a run directory, but {path} holds no config.yaml")
        run._lock()
        return run

    def _was_claimed(self) -> bool:
        """Whether a run that ended before it was described began here."""
        return (self.path / _LOCK).exists()

    def _lock(self) -> None:
        self._lock_file = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirectoryError(f"{self.path} is in use by a run that is still going on") from None
        except OSError as error:
            raise RunDirectoryError(
                f"{self.path} must be on a file system that locks files, but flock says: {error.strerror}. "
                "Choose another by output_dir=… (hydra.sweep.dir=… of a sweep), or have it mounted with flock"
            ) from None
        os.set_inheritable(self._lock_file.fileno(), False)

    def loss(self) -> str:
        """What became of the directory if it is no longer where it was claimed; empty while it is there."""
        ours = self._lock_file.fileno()
        try:
            if os.path.samestat(os.fstat(ours), (self.path / _LOCK).stat()):
                return ""
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:
            return ""  # a file system that does not answer now may do so again
        now = Path(os.readlink(f"/proc/self/fd/{ours}")) if sys.platform == "linux" else None
        if now and now.exists():
            resume = shlex.quote(f"resume={now.parent}")
            return (
                f"the run directory {self.path} was moved to {now.parent} while the run went on, which ended "
                f"it there; go on from its last checkpoint with: python -m gymexp.train {resume}"
            )
        return (
            f"the run directory {self.path} was deleted while the run went on, which ended it: nothing of it "
            "is left to go on from. Start it again, and delete a run's directory only after its end"
        )

    def read_result(self) -> dict[str, Any]:
        """How the run ended: {"step", "stopped", "held_out"} or {"error"}; empty while it goes on."""
        return read_json(self.result)

    def write_result(self, result: dict[str, Any]) -> None:
        replace_file(self.result, json.dumps(printable_in(result), indent=1))

    def write_error(self, error: str) -> None:
        """Why the run ended, unless the trainer has said so itself; where it can still be written."""
        if "error" not in self.read_result():
            with contextlib.suppress(OSError):
                self.write_result({"error": error})

    def write_status(self, **status: Any) -> None:
        """What is in the way of this ends no run, but may be why it ends: `what_is_wrong`."""
        with self._refusals():
            replace_file(self.status, json.dumps(printable_in(status), indent=1) + "\n")
            self._refused = None

    def note(self, line: dict[str, Any]) -> None:
        """A line of timeline.jsonl; as `write_status`."""
        with self._refusals():
            append_line(self.timeline, line)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._refused = error

    def what_is_wrong(self) -> str:
        """Why nobody can write here now, and what to do; empty where one can, or where the trainer has said
        it."""
        if lost := self.loss():
            return lost
        if self._refused is None or self.read_result():
            return ""
        resume = shlex.quote(f"resume={self.path}")
        return f"{in_words(self._refused)}; then go on with: python -m gymexp.train {resume}"


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []
