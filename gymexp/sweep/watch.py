"""Watches submitted jobs until they end, by Slurm's queue and the runs' own files.

`squeue` knows a job until some minutes after its end (MinJobAge), and `sacct` also later, if the cluster
keeps accounting. The runs' files have the results. The jobs do not need the process that submitted them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gymexp.cluster.slurm_states import GOING_ON, slurm_states
from gymexp.errors import LaunchError
from gymexp.files import read_json
from gymexp.record.directory import RunDirectory, failure_of
from gymexp.sweep.check import End
from gymexp.sweep.freeze import name_of, read_sweep
from gymexp.view.progress import View, duration

_POLL_S = 2.0
_SUMMARY_S = 60.0  # between two lines about steps
_FILE_LAG_S = 10.0  # until this machine sees a file that a job wrote on its node
_SILENCE_S = 1800.0  # without an answer of Slurm's before the watch ends; the jobs do not need the watch
GONE = "GONE"  # the state of a job that Slurm does not know, or no longer knows


def states(job_ids: Iterable[str]) -> dict[str, str] | None:
    """Returns Slurm's state of each job, GONE for a job that Slurm does not know. Returns None if Slurm does
    not answer."""
    ids = list(job_ids)
    known = slurm_states(ids)
    if known is None:
        return None
    return {job_id: known[job_id].name if job_id in known else GONE for job_id in ids}


def log_of(sweep: Path, job_id: str) -> Path:
    """Returns the path of the log with the output of a job's controller, over all starts of the job."""
    return sweep / "slurm" / f"{job_id}_0_log.out"


def end_of(sweep: Path, entry: dict[str, Any], state: str) -> End:
    """Returns how a job ended, according to its result.json.

    entry: the job's entry in sweep.json. state: Slurm's state of the job, which the error names if the run
    left no result.
    """
    run = RunDirectory(sweep / str(entry["num"]))
    result = run.read_result()
    reason = "Slurm does not know it any more" if state == GONE else f"Slurm says {state}"
    error = failure_of(result, f"job {entry['job_id']} ended without a result; {reason}")
    return End(name_of(entry["num"], entry["swept"]), result, error, log_of(sweep, entry["job_id"]))


def wait(sweep: Path, nums: Sequence[int]) -> dict[int, End]:
    """Show the states of the jobs until all have ended. Returns their ends by number.

    Ctrl-C leaves the jobs running and exits with 130. Raises LaunchError if Slurm does not answer for half an
    hour; the jobs may still run then.
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
    shown: dict[int, str] = {}  # the last state that was shown of each job
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
                view.say("Slurm does not answer; its jobs are assumed to go on")
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
                if state != "COMPLETING" and state != shown.get(num):
                    shown[num] = state
                    view.say(f"job {num} ({entry['job_id']}): {state.lower()}")
                continue
            over_since.setdefault(num, time.monotonic())
            end = end_of(sweep, entry, state)
            if end.result.get("step") is None and time.monotonic() - over_since[num] < _FILE_LAG_S:
                continue
            ends[num] = end
            outcome = "finished" if end.error is None else f"failed: {end.error.splitlines()[0]}"
            view.say(f"job {num} ({entry['job_id']}): {outcome} ({len(ends)}/{len(entries)})")
        if time.monotonic() - summed > _SUMMARY_S and (line := _steps(sweep, open_)):
            view.say(f"{duration(time.monotonic() - began)}  {line}")
            summed = time.monotonic()
        if len(ends) < len(entries):
            time.sleep(_POLL_S)
    return {entry["num"]: ends[entry["num"]] for entry in entries}


def _steps(sweep: Path, entries: Sequence[dict[str, Any]]) -> str:
    """Returns the phase and step of each running job: `0: train 3/32  2: evaluate`."""
    parts = []
    for entry in entries:
        status = read_json(RunDirectory(sweep / str(entry["num"])).status)
        if status and status.get("ended") is None:
            at = f" {status['step']}/{status['max_steps']}" if status.get("max_steps") else ""
            parts.append(f"{entry['num']}: {status['phase']}{at}")
    return "  ".join(parts)
