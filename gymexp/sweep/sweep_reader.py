"""A sweep read from its directory: its jobs, their states, and whether a local sweep still runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gymexp.cluster.slurm_states import slurm_states
from gymexp.config.plain_yaml import load_plain_yaml
from gymexp.errors import RunDirectoryError
from gymexp.record.optuna_study import TRIAL_KEY, read_trial, summary
from gymexp.record.own_files import check_own
from gymexp.record.run_state import process_lives, read_run
from gymexp.sweep import freeze
from gymexp.sweep.sweep import Job, Sweep


def is_sweep(path: Path) -> bool:
    """Returns whether a directory is a sweep's, even if its sweep.json is lost."""
    return (path / "sweep.json").exists() or bool(_job_directories(path))


def read_sweep(path: Path) -> Sweep:
    """Returns the sweep in a directory, from sweep.json, or from the run directories if sweep.json is lost.

    Raises RunDirectoryError if the directory has neither.
    """
    path = path.resolve()
    record: dict[str, Any] = {}
    if (path / "sweep.json").exists():
        record = freeze.read_sweep(path)
        launcher, entries = record["launcher"], record["jobs"]
    else:
        entries = [_entry(directory) for directory in _job_directories(path)]
        launcher = "slurm" if any(entry["job_id"] for entry in entries) else "local"
        for entry, swept in zip(entries, freeze.swept_of([e["overrides"] for e in entries]), strict=True):
            entry["swept"] = swept
    if not entries:
        raise RunDirectoryError(f"{path} must be a sweep, with a sweep.json or run directories 0/ 1/ 2/ …")
    states = slurm_states(entry["job_id"] for entry in entries if entry["job_id"])
    jobs = []
    for entry in sorted(entries, key=lambda entry: entry["num"]):
        directory = path / str(entry["num"])
        check_own(directory)
        swept = {key: value for key, value in entry["swept"].items() if key != TRIAL_KEY}
        if trial := read_trial(directory):
            swept |= {key: _short_text(value) for key, value in trial.values.items()}
        run = read_run(directory, states, entry["job_id"])
        jobs.append(Job(entry["num"], entry["overrides"], swept, entry["job_id"], run))
    if launcher == "local" and not is_running(record, jobs):
        jobs = [_not_begun(job) if job.run.state == "waiting" else job for job in jobs]
    return Sweep(path, launcher, jobs, summary(path))


def is_running(record: Mapping[str, Any], jobs: Sequence[Job]) -> bool:
    """Returns whether the process of a local sweep still runs the sweep's jobs.

    record: the content of sweep.json. If the process is another machine's, the sweep counts as running while
    one of its jobs does.
    """
    lives = process_lives(record)
    return any(job.run.state == "running" for job in jobs) if lives is None else lives


def _not_begun(job: Job) -> Job:
    run = dataclasses.replace(job.run, state="stopped", why="its sweep ended before it began")
    return dataclasses.replace(job, run=run)


def _short_text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _job_directories(path: Path) -> list[Path]:
    directories = [d for d in path.glob("*") if d.name.isdigit() and d.is_dir() and _overrides_file(d)]
    return sorted(directories, key=lambda d: int(d.name))


def _overrides_file(directory: Path) -> Path | None:
    return next((f for name in ("overrides.yaml", "job.yaml") if (f := directory / name).exists()), None)


def _entry(directory: Path) -> dict[str, Any]:
    """Returns the entry that sweep.json would have for the job in `directory`, with an empty `swept`."""
    file = _overrides_file(directory)
    assert file is not None
    try:
        content: Any = load_plain_yaml(file.read_bytes())
        overrides = [str(item) for item in (content["overrides"] if isinstance(content, dict) else content)]
    except (KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(f"{file} must have the overrides of a job: {error}") from None
    job_id = read_run(directory).status.get("job_id")
    return {"num": int(directory.name), "overrides": overrides, "job_id": job_id, "swept": {}}
