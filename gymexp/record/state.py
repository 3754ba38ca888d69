"""What a run directory says of its run, whoever wrote it and wherever that process is now."""

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

from gymexp.cluster.slurm import SlurmState
from gymexp.files import read_json, read_lines
from gymexp.processes.clock import start_ticks
from gymexp.record.directory import Ended, is_whole
from gymexp.record.metric_names import by_env, of_each_env

ENDED = ("finished", "pruned", "stopped", "failed", "lost")
_STALE_S = 120.0  # a controller writes status.json every second; network file systems may show it late
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class RunState:
    """state: waiting, running, or one of ENDED. why: a line: what it waits for, or how it ended.

    A run is lost when its process is gone and left no end: killed, or with its node.
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
        """The whole lines of metrics.jsonl."""
        return read_lines(self.path / "metrics.jsonl")

    @cached_property
    def held_out(self) -> dict[str, tuple[float | None, float | None]]:
        """Mean held-out reward of each environment: before training, and the newest after a step of it."""
        if said := self.result.get("held_out"):
            rewards = {env: m["reward"] for env, m in said.items() if "reward" in m}
            return {env: (before, after) for env, (before, after) in rewards.items()}
        found: dict[str, tuple[float | None, float | None]] = {}
        for entry in self.metrics:
            for env, value in of_each_env(entry, "reward", held_out=True).items():
                before, _ = found.get(env, (None, None))
                found[env] = (value, None) if entry["step"] == 0 else (before, value)
        return found

    @property
    def log(self) -> Path | None:
        """The log that tells most of how it ended."""
        named = re.findall(
            r"(/\S[^\n:]*?\.(?:log|err|out))\b",
            str(self.result.get("error") or self.status.get("outcome") or ""),
        )
        for path in (*map(Path, named), self.path / "logs" / "trainer.log"):
            if path.exists():
                return path
        return None


def read_run(
    path: Path, slurm: Mapping[str, SlurmState] | None = None, job_id: str | None = None
) -> RunState:
    """`slurm`: what Slurm says of its jobs; None if it was not asked or does not answer.

    job_id: the job that the run was submitted as, where Slurm was asked of it.
    """
    status, result = read_json(path / "status.json"), read_json(path / "result.json")
    job = (slurm or {}).get(job_id or status.get("job_id") or "")
    state, why = _state(path, status, result, job, slurm is not None and bool(job_id or status.get("job_id")))
    if state == "lost" and job_id and slurm is None:
        state, why = "waiting", "Slurm does not answer"  # which is no job's end
    return RunState(path, state, why, status, result if state in ENDED else {})


def _state(
    path: Path, status: dict[str, Any], result: dict[str, Any], job: SlurmState | None, asked_slurm: bool
) -> tuple[str, str]:
    ended = status.get("ended")
    if job and job.waits:
        # It may be submitted again: what an earlier attempt left is not its end.
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
    if asked_slurm:
        end = f"Slurm says {job.name}" if job else "Slurm knows its job no more"
        return "stopped" if job and job.name == "CANCELLED" else "lost", f"{end}, and it left no end"
    if not status and (path / "status.json").exists():
        return "lost", "its status.json is damaged"
    if not status:
        return "waiting", "not begun"
    if ended == Ended.REQUEUED:
        return "waiting", ended
    if _process_lives(path, status):
        return "running", ""
    if result.get("stopped"):  # of a gymexp that did not write `ended`
        return "stopped", _first_line(str(status.get("outcome") or ""))
    return "lost", f"its process ({status.get('pid')}) is gone and left no end"


def _process_lives(path: Path, status: dict[str, Any]) -> bool:
    """Whether the controller runs: asked of this machine if it is here, else told by its file's age."""
    here = process_lives(status)
    return time.time() - (path / "status.json").stat().st_mtime < _STALE_S if here is None else here


def process_lives(said: Mapping[str, Any]) -> bool | None:
    """Of a process that wrote what `clock.this_process` says. None if it is another machine's."""
    if said.get("host", socket.gethostname()) != socket.gethostname():
        return None
    try:
        process = psutil.Process(said["pid"])
        # The number may be another process's by now, which started at another time: later than what was
        # written, by a clock that may have been set since.
        if said.get("ticks") is not None:
            return process.status() != psutil.STATUS_ZOMBIE and start_ticks(said["pid"]) == said["ticks"]
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= said["began"] + 1
    except (psutil.NoSuchProcess, KeyError):
        return False


def wall_seconds(run: RunState) -> float:
    """From each start to its end, or to its last sign of life, of all attempts together.

    The controller notes `seconds` since its start beside the time of day, which somebody may have set. A
    start that was killed left none at its end, and what it logged last counts by the time of day.
    """
    starts: list[list[dict[str, Any]]] = []
    for line in read_lines(run.path / "timeline.jsonl"):
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
    """Tokens that the policy sampled for training, a second of its steps."""
    tokens = seconds = 0.0
    for entry in run.metrics:
        if "time/step" in entry:
            seconds += entry["time/step"]
            for metrics in by_env(entry, held_out=False).values():
                tokens += metrics.get("tokens", 0) * metrics["rollouts"]
    return tokens / seconds if seconds else None


def last_errors(run: RunState, most: int = 5) -> list[tuple[str, str]]:
    """(process, line): the last line of each log that tells of an error, the newest log first."""
    logs = sorted((run.path / "logs").glob("*.log"), key=lambda log: log.stat().st_mtime, reverse=True)
    found = []
    for log in logs:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        telling = [
            line for line in lines if re.search(r"\b(ERROR|CRITICAL)\b|^\S*(Error|Exception)\b.*:", line)
        ]
        found += [(log.stem, line.strip()) for line in telling[-1:]]
    return found[:most]


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
