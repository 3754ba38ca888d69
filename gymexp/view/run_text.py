"""The state of one run as text, and its new log lines while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gymexp.cluster.slurm_states import slurm_states
from gymexp.record.run_state import RunState, last_errors, read_run, tokens_per_s, wall_seconds
from gymexp.view.progress import View, duration

_POLL_S = 0.5
_STATE_S = 5.0  # seconds between two checks of whether the run has ended
_SHOWN = 2_000  # bytes at the end of an existing log that are shown at the start


def look(path: Path) -> RunState:
    """Returns the state of the run in a directory. If the run is a Slurm job, Slurm is queried too."""
    run = read_run(path)
    job_id = run.status.get("job_id")
    return read_run(path, slurm_states([job_id]), job_id) if job_id else run


def run_text(run: RunState) -> str:
    """Returns a run's state as lines: directory, step, times, held-out rewards, servers, last errors."""
    status = run.status
    last = status.get("max_steps")
    lines = [f"{run.path}", f"{run.state}{f': {run.why}' if run.why else ''}"]
    if not run.ended and status:
        lines.append(f"phase     {status.get('phase')}")
    if last:
        lines.append(f"step      {run.step}/{last}")
    if job := status.get("job_id"):
        lines.append(f"job       {job} on {status.get('node')}, restarts: {status.get('restarts')}")
    elif status.get("pid"):
        lines.append(f"process   {status['pid']} on {status.get('host', 'this machine')}")
    lines.append(f"time      {duration(wall_seconds(run))}")
    for env, (before, newest) in run.held_out.items():
        pair = " → ".join("–" if value is None else f"{value:.3f}" for value in (before, newest))
        lines.append(f"held-out  {env} {pair}")
    lines += _rates(run)
    if not run.ended and (states := status.get("services")):
        lines.append("servers   " + "  ".join(f"{name} {state}" for name, state in states.items()))
    lines += [f"{name}.log: {line}" for name, line in last_errors(run)]
    if run.state in ("failed", "lost") and run.log:
        lines.append(f"log       {run.log}")
    return "\n".join(lines)


def _rates(run: RunState) -> Iterator[str]:
    trained = [entry for entry in run.metrics if "time/step" in entry][-5:]
    if trained:
        each = sum(entry["time/step"] for entry in trained) / len(trained)
        rollouts = sum(entry.get("time/rollout", 0) for entry in trained) / len(trained)
        tokens = tokens_per_s(run) or 0
        yield f"rates     {each:.1f} s a step ({rollouts:.1f} rollouts), {tokens:.0f} tokens/s"


class Tail:
    """Reads new lines of the logs in a folder. A log may appear later, and may be truncated."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._at: dict[Path, int] = {}
        self._part: dict[Path, bytes] = {}
        for path in sorted(folder.glob("*.log")):
            with path.open("rb") as file:
                if file.seek(0, 2) > _SHOWN:
                    file.seek(-_SHOWN, 2)
                    file.readline()  # skip the rest of an incomplete line
                    self._at[path] = file.tell()

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yields (process, line) for each complete line since the last call."""
        for path in sorted(self._folder.glob("*.log")):
            for line in self._read(path):
                yield path.stem, line

    def _read(self, path: Path) -> list[str]:
        start = self._at.get(path, 0)
        with path.open("rb") as file:
            if file.seek(0, 2) < start:  # the file was truncated: read it from its beginning
                start, self._part[path] = 0, b""
            file.seek(start)
            new = file.read()
        self._at[path] = start + len(new)
        *whole, rest = (self._part.get(path, b"") + new).split(b"\n")
        self._part[path] = rest
        # A progress bar overwrites its line after "\r"; only the last state is shown.
        return [line.decode(errors="replace").rstrip("\r").rpartition("\r")[2] for line in whole]


def follow(path: Path, view: View, sleep: Callable[[float], Any] = time.sleep) -> RunState:
    """Prints a run's new log lines and steps until it has ended; returns its final state."""
    tail = Tail(path / "logs")
    num_shown = len(read_run(path).metrics)
    checked_at, run = time.monotonic(), look(path)
    while True:
        ended = run.ended
        for name, line in tail.lines():
            view.say(f"{name}: {line}")
        now = read_run(path)
        if len(now.metrics) < num_shown:  # a resumed run removes the entries after its checkpoint
            num_shown = len(now.metrics)
        for entry in now.metrics[num_shown:]:
            steps = {"step": entry["step"], "max_steps": now.status.get("max_steps")}
            view.update({"phase": now.status.get("phase"), **steps})
            view.log(entry["step"], entry)
        num_shown = len(now.metrics)
        if ended:
            return run
        sleep(_POLL_S)
        if now.status.get("ended") or time.monotonic() - checked_at > _STATE_S:
            checked_at, run = time.monotonic(), look(path)
