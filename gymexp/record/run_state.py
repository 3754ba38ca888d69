"""Reads the state of a run from its directory, on any machine and whether or not its processes still run."""

from __future__ import annotations

import math
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil

from gymexp.cluster.slurm_states import SlurmState
from gymexp.files import read_json, read_lines
from gymexp.processes.clock import start_ticks
from gymexp.record.directory import Ended, is_whole
from gymexp.record.metric_names import by_env, of_each_env

ENDED = ("finished", "pruned", "stopped", "failed", "lost")
_STALE_S = 120.0  # a controller writes status.json every second; a network file system may show it late
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class RunState:
    """The state of a run: waiting, running, or one of ENDED.

    A run is `lost` if its process is gone and recorded no end, because it was killed or its node failed.

    why: one line that says what the run waits for, or how it ended.
    """

    path: Path
    state: str
    why: str = ""
    status: Mapping[str, Any] = field(default_factory=dict)  # status.json
    result: Mapping[str, Any] = field(default_factory=dict)  # result.json

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def step(self) -> int:
        return self.result.get("step") or self.status.get("step") or 0

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The entries of metrics.jsonl; an incomplete line is left out."""
        return read_lines(self.path / "metrics.jsonl")

    @cached_property
    def held_out(self) -> dict[str, tuple[float | None, float | None]]:
        """Mean held-out reward of each environment: (before training, newest after a training step)."""
        if held_out := self.result.get("held_out"):
            rewards = {env: m["reward"] for env, m in held_out.items() if "reward" in m}
            return {env: (before, after) for env, (before, after) in rewards.items()}
        pairs: dict[str, tuple[float | None, float | None]] = {}
        for entry in self.metrics:
            for env, value in of_each_env(entry, "reward", held_out=True).items():
                before, _ = pairs.get(env, (None, None))
                pairs[env] = (value, None) if entry["step"] == 0 else (before, value)
        return pairs

    @property
    def log(self) -> Path | None:
        """The log that explains the end best: the one that the error names, else the trainer's or the
        evaluator's, else None."""
        named = re.findall(
            r"(/\S[^\n:]*?\.(?:log|err|out))\b",
            str(self.result.get("error") or self.status.get("outcome") or ""),
        )
        own = (self.path / "logs" / f"{name}.log" for name in ("trainer", "evaluator"))
        for path in (*map(Path, named), *own):
            if path.exists():
                return path
        return None


def read_run(
    path: Path, slurm: Mapping[str, SlurmState] | None = None, job_id: str | None = None
) -> RunState:
    """Returns the state of the run in `path`, from its status.json and result.json and from Slurm.

    slurm: the states of Slurm's jobs; None if Slurm was not queried or does not answer. job_id: the job that
    the run was submitted as, if Slurm was queried for it.
    """
    status, result = read_json(path / "status.json"), read_json(path / "result.json")
    job = (slurm or {}).get(job_id or status.get("job_id") or "")
    slurm_answered = slurm is not None and bool(job_id or status.get("job_id"))
    state, why = _state(path, status, result, job, slurm_answered)
    if state == "lost" and job_id and slurm is None:
        state, why = "waiting", "Slurm does not answer"  # the job may still run
    return RunState(path, state, why, status, result if state in ENDED else {})


def _state(
    path: Path, status: dict[str, Any], result: dict[str, Any], job: SlurmState | None, slurm_answered: bool
) -> tuple[str, str]:
    ended = status.get("ended")
    if job and job.waits:
        # The job may be a resubmitted one, so the result of an earlier attempt does not count.
        return "waiting", " ".join(filter(None, (job.name.lower(), job.reason)))
    if is_whole(result):
        return ("pruned", result["pruned"]) if result.get("pruned") else ("finished", "")
    if job and not job.over:
        return "running", "" if status else f"starting on {job.reason}"
    if ended == Ended.FINISHED:
        return "finished", "its result.json is damaged"
    if "error" in result:
        return "failed", _first_line(str(result["error"]))
    if ended in (Ended.STOPPED, Ended.FAILED):
        return str(ended), _first_line(str(status.get("outcome")))
    if slurm_answered:
        end = f"Slurm says {job.name}" if job else "Slurm knows its job no more"
        return "stopped" if job and job.name == "CANCELLED" else "lost", f"{end}, and it recorded no end"
    if not status and (path / "status.json").exists():
        return "lost", "its status.json is damaged"
    if not status:
        return "waiting", "not begun"
    if ended == Ended.REQUEUED:
        return "waiting", ended
    if _process_lives(path, status):
        return "running", ""
    if result.get("stopped"):  # an earlier version of gymexp did not write `ended`
        return "stopped", _first_line(str(status.get("outcome") or ""))
    return "lost", f"its process ({status.get('pid')}) is gone and recorded no end"


def _process_lives(path: Path, status: dict[str, Any]) -> bool:
    """Returns whether the controller runs. On another machine, the age of status.json decides."""
    lives = process_lives(status)
    return time.time() - (path / "status.json").stat().st_mtime < _STALE_S if lives is None else lives


def process_lives(identity: Mapping[str, Any]) -> bool | None:
    """Returns whether a process still runs; None if it ran on another machine.

    identity: the fields of `clock.this_process`, as the process wrote them.
    """
    if identity.get("host", socket.gethostname()) != socket.gethostname():
        return None
    try:
        process = psutil.Process(identity["pid"])
        # Another process may have the same pid by now; its start time differs. Ticks are exact. `began` is by
        # the wall clock, which may have been set since, so only a later start time counts as different.
        if identity.get("ticks") is not None:
            return (
                process.status() != psutil.STATUS_ZOMBIE and start_ticks(identity["pid"]) == identity["ticks"]
            )
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= identity["began"] + 1
    except (psutil.NoSuchProcess, KeyError):
        return False


def wall_seconds(run: RunState) -> float:
    """Returns the seconds that a run took: the sum over all its starts.

    A start counts to its end, or to its last sign of life. The controller records `seconds` since its start
    beside the time of day, as the clock may be set meanwhile. A start that was killed recorded no end; the
    time of day of its last log entry counts.
    """
    starts: list[list[dict[str, Any]]] = []
    for line in read_lines(run.path / "timeline.jsonl"):
        if "span" in line:
            continue  # its `seconds` are its duration
        if line.get("event") == "start":
            starts.append([])
        if starts:
            starts[-1].append(line)
    total = 0.0
    for lines, later in zip_longest(starts, starts[1:]):
        first = lines[0]
        signs = [_between(first, line) for line in lines]
        if later is None and "seconds" in run.status:
            signs.append(_between(first, {"time": first["time"], **run.status}))
        elif lines[-1].get("event") != "end":
            until = later[0]["time"] if later else math.inf
            signs += [m["time"] - first["time"] for m in run.metrics if first["time"] <= m["time"] <= until]
        total += max(signs)
    return total


def _between(first: Mapping[str, Any], line: Mapping[str, Any]) -> float:
    by = "seconds" if "seconds" in first and "seconds" in line else "time"
    return line[by] - first[by]


def tokens_per_s(run: RunState) -> float | None:
    """Returns the tokens sampled for training per second of training steps; None before the first step."""
    tokens = seconds = 0.0
    for entry in run.metrics:
        if "time/step" in entry:
            seconds += entry["time/step"]
            for metrics in by_env(entry, held_out=False).values():
                tokens += metrics.get("tokens", 0) * metrics["rollouts"]
    return tokens / seconds if seconds else None


def last_errors(run: RunState, most: int = 5) -> list[tuple[str, str]]:
    """Returns (process, line) with the last error line of each log, the newest log first."""
    logs = sorted((run.path / "logs").glob("*.log"), key=lambda log: log.stat().st_mtime, reverse=True)
    errors = []
    for log in logs:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        error_lines = [
            line for line in lines if re.search(r"\b(ERROR|CRITICAL)\b|^\S*(Error|Exception)\b.*:", line)
        ]
        errors += [(log.stem, line.strip()) for line in error_lines[-1:]]
    return errors[:most]


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
