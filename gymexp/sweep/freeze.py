"""A sweep's directory, which fixes the sweep's code and each job's whole configuration at submission.

outputs/<name>/sweep_<date_time>/
    sweep.json code/ slurm/ 0/ 1/ 2/ …          a job's folder has job.yaml, and the run's files once it began

sweep.json: {"schema": 2, "began": unix s, "launcher": "slurm" or "local", "host", "pid", "ticks", "cwd",
"command": [argv], "sbatch": flags of hydra.launcher, "jobs": [{"num", "overrides": [...], "swept": {key:
value}, "job_id": "123_0" or null}]}.
`swept` has the overrides that differ between jobs. `job_id` is that of the newest submission.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gymexp.config.load import load
from gymexp.config.schema import RunConfig
from gymexp.errors import RunDirectoryError
from gymexp.files import replace_file
from gymexp.processes.clock import this_process
from gymexp.record.code_snapshot import snapshot

# Raise it when a job's function moves, or a file in a sweep's directory changes its meaning.
SCHEMA = 2


@dataclass(frozen=True)
class FrozenJob:
    """One job of a sweep: its checked configuration, and the overrides that made it.

    evaluation: the whole configuration of an evaluation, which `config` is made of; None for a training run.
    """

    config: RunConfig
    overrides: list[str]
    evaluation: dict[str, Any] | None = None


def freeze(sweep: Path, launcher: str, jobs: Mapping[int, FrozenJob], sbatch: Mapping[str, Any]) -> None:
    """Write `jobs`, by number, to the sweep's directory. sweep.json is written last.

    Jobs of an earlier call stay, and the code is that of the first call, as a sweeper may launch in batches.
    sbatch: flags of `hydra.launcher`. Raises RunDirectoryError if a job's number is taken.
    """
    record = read_sweep(sweep) if (sweep / "sweep.json").exists() else None
    if record is None:
        snapshot(sweep / "code", runnable=True)
        record = {
            "schema": SCHEMA,
            "launcher": launcher,
            **this_process(),
            "cwd": str(Path.cwd()),
            "command": [sys.executable, *sys.orig_argv[1:]],
            "sbatch": dict(sbatch),
            "jobs": [],
        }
    if taken := {entry["num"] for entry in record["jobs"]} & jobs.keys():
        raise RunDirectoryError(
            f"{sweep} holds a sweep already, with job {min(taken)}: choose another hydra.sweep.dir"
        )
    for num, job in jobs.items():
        write_job(sweep / str(num), job)
        record["jobs"].append({"num": num, "overrides": job.overrides, "swept": {}, "job_id": None})
    entries = record["jobs"]
    for entry, swept in zip(entries, swept_of([entry["overrides"] for entry in entries]), strict=True):
        entry["swept"] = swept
    write_sweep(sweep, record)


def take_back(sweep: Path, nums: Iterable[int]) -> None:
    """Remove the files that Hydra and `freeze` wrote for jobs that were not submitted, and no other files.

    Does nothing if any job of the sweep was submitted.
    """
    record = read_sweep(sweep) if (sweep / "sweep.json").exists() else {"jobs": []}
    if any(entry["job_id"] for entry in record["jobs"]):
        return
    for num in nums:
        (sweep / str(num) / "job.yaml").unlink(missing_ok=True)
    for name in ("code", "slurm"):
        shutil.rmtree(sweep / name, ignore_errors=True)
    for name in ("sweep.json", "multirun.yaml"):
        (sweep / name).unlink(missing_ok=True)
    for folder in (*(sweep / str(num) for num in nums), sweep):
        with contextlib.suppress(OSError):  # the folder is missing, or has a file of the user's
            folder.rmdir()


def swept_of(jobs: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Returns for each job the overrides that are not the same in all jobs, as key -> value.

    Overrides are `key=value`, `+key=value` or `~key`. The `+` is not part of the key.
    """
    pairs = [{o.partition("=")[0].lstrip("+"): o.partition("=")[2] for o in job} for job in jobs]
    keys = list(dict.fromkeys(key for job in pairs for key in job))
    differ = [key for key in keys if len({job.get(key) for job in pairs}) > 1]
    return [{key: job[key] for key in differ if key in job} for job in pairs]


def name_of(num: int, swept: Mapping[str, str]) -> str:
    """Returns a job's name for messages: `job 3 (seed=1)`."""
    overrides = " ".join(f"{key}={value}" for key, value in swept.items())
    return f"job {num} ({overrides})" if overrides else f"job {num}"


def read_sweep(sweep: Path) -> dict[str, Any]:
    """Returns the content of sweep.json. Raises RunDirectoryError if the file cannot be read, or has another
    schema."""
    try:
        record = json.loads((sweep / "sweep.json").read_text())
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{sweep} must be a sweep's directory with a sweep.json: {error}") from None
    if record.get("schema") != SCHEMA:
        own_code = f"PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(sweep.resolve() / 'code'))}"
        raise RunDirectoryError(
            f"{sweep / 'sweep.json'} must be of schema {SCHEMA}, got {record.get('schema')!r}: another "
            "version of gymexp made this sweep. Its jobs run their own copy of the code, and the command can "
            f"too: {own_code} python -m gymexp.sweep …"
        )
    return record


def claim(sweep: Path) -> None:
    """Record this process in sweep.json as the one that runs the jobs of a local sweep."""
    record = read_sweep(sweep)
    write_sweep(sweep, record | this_process())


def write_sweep(sweep: Path, record: Mapping[str, Any]) -> None:
    """Write `record` to sweep.json, which `read_sweep` reads."""
    replace_file(sweep / "sweep.json", json.dumps(record, indent=1) + "\n")


def write_job(directory: Path, job: FrozenJob) -> None:
    """Write a job to `directory`/job.yaml, which `read_job` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"overrides": job.overrides, "config": dataclasses.asdict(job.config)}
    if job.evaluation is not None:
        record["evaluation"] = job.evaluation
    replace_file(directory / "job.yaml", OmegaConf.to_yaml(OmegaConf.create(record)))


def read_job(directory: Path) -> FrozenJob:
    """Returns the job in `directory`/job.yaml, after checking its configuration again."""
    record: Any = OmegaConf.load(directory / "job.yaml")
    evaluation: Any = OmegaConf.to_container(record, resolve=False)
    return FrozenJob(load(record.config), list(record.overrides), evaluation.get("evaluation"))
