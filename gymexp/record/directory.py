"""The run directory: claimed once and locked by one process, self-describing, replaced file by file.

outputs/<name>/<date_time>/
    config.yaml overrides.yaml versions.txt code/ data/ checkpoints/ logs/<process>.log
    rollouts/step-000001.jsonl.zst metrics.jsonl timeline.jsonl system.jsonl status.json …
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
from gymexp.record import linked_folders
from gymexp.record.code_snapshot import _versions, snapshot

_LOCK = ".lock"
PLAN = "evaluation.json"  # what an evaluation plays; a run has no such file
# Files that Hydra, a sweep or a job may write to a run's directory before the run begins.
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
    """Returns the run below outputs/<name>/ that was written to last.

    Raises RunDirectoryError if `outputs` contains no run.
    """
    runs = [config.parent for config in outputs.glob("*/*/config.yaml")]
    if not runs:
        raise RunDirectoryError(
            f"resume=latest must find a run in {outputs.absolute()}/<name>/<date_time>, but there is none: "
            "say resume=… with its directory"
        )
    return max(runs, key=lambda run: max(file.stat().st_mtime for file in run.glob("*.*")))


class Ended(StrEnum):
    """How a start of a run ended: the value of `ended` in status.json, beside the text in `outcome`."""

    FINISHED = "finished"
    STOPPED = "stopped"  # on request, e.g. by a signal
    FAILED = "failed"
    REQUEUED = "requeued"  # its Slurm job will start it again


def is_whole(result: Mapping[str, Any]) -> bool:
    """Returns whether a result.json belongs to a run that trained to its end or was pruned."""
    return "step" in result and not result["stopped"]


def failure_of(result: Mapping[str, Any], otherwise: str) -> str | None:
    """Returns why a run that is over did not finish; None if it finished.

    otherwise: the text for a run whose result.json gives no error, or is missing.
    """
    return None if is_whole(result) else result.get("error") or otherwise


class RunDirectory:
    """One run's directory, locked by this process until it ends.

    The lock is advisory, so that a crash releases it. A new run calls `claim`, writes the tasks to `data`,
    then calls `describe`. So a directory with a config.yaml has everything that a resumed run needs.
    """

    def __init__(self, path: Path, command: str = "train") -> None:
        """command: gymexp's command that made the directory, and goes on with it."""
        self.path = path
        self.command = command
        self.logs = path / "logs"
        self.data = path / "data"
        self.checkpoints = path / "checkpoints"
        self.rollouts = path / "rollouts"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.timeline = path / "timeline.jsonl"
        self.system = path / "system.jsonl"
        self.status = path / "status.json"
        self.result = path / "result.json"
        self._refused: OSError | None = None  # the error of the last write, if it failed

    @property
    def resume_command(self) -> str:
        """The command line that goes on with what the directory is of."""
        return f"python -m gymexp.{self.command} {shlex.quote(f'resume={self.path}')}"

    @classmethod
    def claim(cls, path: Path, command: str = "train") -> RunDirectory:
        """Makes and locks a new run's directory.

        Raises RunDirectoryError if the directory already contains a run or files of the user's own.
        """
        run = cls(path, command)
        if run.config.exists():
            raise RunDirectoryError(
                f"{path} holds a run already: go on with it by resume={path}, or choose another output_dir"
            )
        linked_folders.check_there(path, run._folders)
        foreign = [] if run._was_claimed() else sorted(run._foreign())
        if foreign:
            raise RunDirectoryError(
                "output_dir must be a new or an empty folder, as a run overwrites files of the same names, "
                f"but {path} has {', '.join(foreign[:5])}: choose another output_dir (hydra.run.dir=…)"
            )
        for directory in run._folders:
            directory.mkdir(parents=True, exist_ok=True)
        run._lock()
        linked_folders.mark(path, run._folders)
        return run

    def describe(self, config: RunConfig, overrides: Sequence[str]) -> None:
        """Writes the run's code, versions, overrides and configuration.

        config.yaml comes last, as its presence marks the directory as a run.
        """
        snapshot(self.path / "code")
        (self.path / "versions.txt").write_text(_versions())
        (self.path / "overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides))
        replace_file(self.config, to_yaml(config))

    def go_on_with(self, config: RunConfig, overrides: Sequence[str]) -> None:
        """Writes the overrides and the configuration of a resumed run, which may train for more steps."""
        if more := [override for override in overrides if not override.startswith("resume=")]:
            with (self.path / "overrides.yaml").open("a") as file:
                file.write("".join(f"- {o}\n" for o in more))
            replace_file(self.config, to_yaml(dataclasses.replace(config, resume=None)))

    def is_finished(self, max_steps: int | None) -> bool:
        """Returns whether the run has trained to its end, and `max_steps` asks for no more steps.

        max_steps: optimizer steps in all; None or less than 1: as configured. Raises RunDirectoryError if the
        run has already trained more than `max_steps`.
        """
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
    def reopen(cls, path: Path, command: str = "train") -> RunDirectory:
        """Locks the directory of a run to resume. Raises RunDirectoryError if it has no config.yaml, if
        another command made it, or if a folder of it is a link that leads nowhere."""
        run = cls(path, command)
        if not run.config.exists():
            raise RunDirectoryError(f"resume must name a run directory, but {path} has no config.yaml")
        if (made_by := "evaluate" if (path / PLAN).exists() else "train") != command:
            other = RunDirectory(path, made_by).resume_command
            raise RunDirectoryError(f"resume: {path} is of gymexp.{made_by}; go on with: {other}")
        linked_folders.check_there(path, run._folders)
        run._lock()
        linked_folders.mark(path, run._folders)
        return run

    @property
    def _folders(self) -> tuple[Path, ...]:
        return self.logs, self.data, self.checkpoints, self.rollouts

    def _foreign(self) -> set[str]:
        """Returns the names in the directory that are not of a run. The run's own folders may be there before
        it, empty, e.g. as links to another disk."""
        ours = {folder.name for folder in self._folders if folder.is_dir() and not _entries(folder)}
        return {path.name for path in _entries(self.path)} - _BEFORE_A_RUN - ours

    def _was_claimed(self) -> bool:
        """Returns whether an earlier run claimed this directory, even if it ended before `describe`."""
        return (self.path / _LOCK).exists()

    def _lock(self) -> None:
        self._lock_file = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirectoryError(f"{self.path} is in use by a run that is still going on") from None
        except OSError as error:
            raise RunDirectoryError(
                f"{self.path} must be on a file system that locks files, but flock failed: {error.strerror}. "
                "Choose another by output_dir=… (hydra.sweep.dir=… of a sweep), or have it mounted with flock"
            ) from None
        os.set_inheritable(self._lock_file.fileno(), False)

    def release(self) -> None:
        """Unlocks the directory, so that another process may go on with it."""
        self._lock_file.close()

    def loss(self) -> str:
        """Returns a message if the directory was moved or deleted since this process locked it; else ""."""
        lock_fd = self._lock_file.fileno()
        try:
            if os.path.samestat(os.fstat(lock_fd), (self.path / _LOCK).stat()):
                return ""
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:
            return ""  # a file system that does not answer now may answer later
        now = Path(os.readlink(f"/proc/self/fd/{lock_fd}")) if sys.platform == "linux" else None
        if now and now.exists():
            moved = RunDirectory(now.parent, self.command)
            return (
                f"the run directory {self.path} was moved to {now.parent} while the run went on, which ended "
                f"it there; go on from its last checkpoint with: {moved.resume_command}"
            )
        return (
            f"the run directory {self.path} was deleted while the run went on, which ended it: nothing of it "
            "is left to go on from. Start it again, and delete a run's directory only after its end"
        )

    def read_result(self) -> dict[str, Any]:
        """Returns result.json: {"step", "stopped", "held_out"} or {"error"}; empty while the run goes on."""
        return read_json(self.result)

    def write_result(self, result: dict[str, Any]) -> None:
        replace_file(self.result, json.dumps(printable_in(result), indent=1))

    def write_error(self, error: str) -> None:
        """Writes an error to result.json, unless the trainer wrote one. A failing write is ignored."""
        if "error" not in self.read_result():
            with contextlib.suppress(OSError):
                self.write_result({"error": error})

    def write_status(self, **status: Any) -> None:
        """Writes status.json. A failing write raises nothing; `what_is_wrong` then gives the reason."""
        with self._refusals():
            replace_file(self.status, json.dumps(printable_in(status), indent=1) + "\n")
            self._refused = None

    def note(self, line: dict[str, Any]) -> None:
        """Appends to timeline.jsonl. A failing write raises nothing; `what_is_wrong` gives the reason."""
        with self._refusals():
            append_line(self.timeline, line)

    def note_system(self, line: dict[str, Any]) -> None:
        """Appends to system.jsonl, like `note`."""
        with self._refusals():
            append_line(self.system, line)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._refused = error

    def what_is_wrong(self) -> str:
        """Returns why the directory cannot be written to now, and what to do.

        Returns "" if the last write succeeded, or if result.json exists, as it gives the reason.
        """
        if lost := self.loss():
            return lost
        if self._refused is None or self.read_result():
            return ""
        return f"{in_words(self._refused)}; then go on with: {self.resume_command}"


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []
