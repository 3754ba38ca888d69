"""How submitted jobs are, and how they ended: from Slurm's queue and the runs' own files.

`squeue` knows a job for some minutes after its end (MinJobAge), `sacct` later on where there is accounting;
the runs' files tell the rest. A submitter that ends takes nothing with it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gymexp.cluster.slurm import GOING_ON, slurm_states
from gymexp.errors import LaunchError
from gymexp.files import read_json
from gymexp.record.directory import RunDirectory, failure_of
from gymexp.sweep.check import End
from gymexp.sweep.freeze import name_of, read_sweep
from gymexp.view.progress import View, duration

_POLL_S = 2.0
_SUMMARY_S = 60.0  # between two lines about steps
_FILE_LAG_S = 10.0  # for what a job wrote on its node to be seen here
_SILENCE_S = 1800.0  # of Slurm, before this stops watching: the jobs need nobody who does
GONE = "GONE"  # Slurm does not know the job (any more)


def states(job_ids: Iterable[str]) -> dict[str, str] | None:
    """Slurm's word on each job; GONE for one that it does not know. None if Slurm does not answer."""
    asked = list(job_ids)
    known = slurm_states(asked)
    if known is None:
        return None
    return {one: known[one].name if one in known else GONE for one in asked}


def log_of(sweep: Path, job_id: str) -> Path:
    """What the job's controller prints, over all its starts."""
    return sweep / "slurm" / f"{job_id}_0_log.out"


def end_of(sweep: Path, entry: dict[str, Any], state: str) -> End:
    """Judge a job that Slurm says is over. state: Slurm's word."""
    run = RunDirectory(sweep / str(entry["num"]))
    result = run.read_result()
    word = "Slurm does not know it any more" if state == GONE else f"Slurm says {state}"
    error = failure_of(result, f"job {entry['job_id']} ended without a result; {word}")
    return End(name_of(entry["num"], entry["swept"]), result, error, log_of(sweep, entry["job_id"]))


def wait(sweep: Path, nums: Sequence[int]) -> dict[int, End]:
    """Show how the jobs are until all are over; returns their ends by number.

    Ctrl-C leaves them to themselves and exits with 130. Raises LaunchError if Slurm does not answer for half
    an hour: that is not the jobs' end.
    """
    entries = [entry for entry in read_sweep(sweep)["jobs"] if entry["num"] in nums]
    view = View()
    view.say(f"{len(entries)} jobs submitted: {sweep}")
    try:
        return _wait(sweep, entries, view)
    except KeyboardInterrupt:
        view.say(f"the jobs go on; python -m gymexp.sweep status {sweep}")
        sys.exit(130)


def _wait(sweep: Path, entries: list[dict[str, Any]], view: View) -> dict[int, End]:
    ends: dict[int, End] = {}
    over_since: dict[int, float] = {}
    before: dict[int, str] = {}
    summed = began = answered = time.monotonic()
    silent = False
    while len(ends) < len(entries):
        open_ = [entry for entry in entries if entry["num"] not in ends]
        known = states(entry["job_id"] for entry in open_)
        if known is None:
            if time.monotonic() - answered > _SILENCE_S:
                raise LaunchError(
                    f"Slurm has not answered for {duration(_SILENCE_S)}; its jobs may go on; later: "
                    f"python -m gymexp.sweep status {sweep}"
                )
            if not silent:
                view.say("Slurm does not answer; its jobs are taken to go on")
            silent = True
            time.sleep(_POLL_S)
            continue
        if silent:
            view.say("Slurm answers again")
        answered, silent = time.monotonic(), False
        for entry in open_:
            num, state = entry["num"], known[entry["job_id"]]
            if state in GOING_ON:
                over_since.pop(num, None)
                if state != "COMPLETING" and state != before.get(num):
                    before[num] = state
                    view.say(f"job {num} ({entry['job_id']}): {state.lower()}")
                continue
            over_since.setdefault(num, time.monotonic())
            end = end_of(sweep, entry, state)
            if end.result.get("step") is None and time.monotonic() - over_since[num] < _FILE_LAG_S:
                continue
            ends[num] = end
            how = "finished" if end.error is None else f"failed: {end.error.splitlines()[0]}"
            view.say(f"job {num} ({entry['job_id']}): {how} ({len(ends)}/{len(entries)})")
        if time.monotonic() - summed > _SUMMARY_S and (line := _steps(sweep, open_)):
            view.say(f"{duration(time.monotonic() - began)}  {line}")
            summed = time.monotonic()
        if len(ends) < len(entries):
            time.sleep(_POLL_S)
    return {entry["num"]: ends[entry["num"]] for entry in entries}


def _steps(sweep: Path, entries: Sequence[dict[str, Any]]) -> str:
    """How far those are that run: `0: train 3/32  2: evaluate`."""
    parts = []
    for entry in entries:
        status = read_json(RunDirectory(sweep / str(entry["num"])).status)
        if status and status.get("ended") is None:
            at = f" {status['step']}/{status['max_steps']}" if status.get("max_steps") else ""
            parts.append(f"{entry['num']}: {status['phase']}{at}")
    return "  ".join(parts)
