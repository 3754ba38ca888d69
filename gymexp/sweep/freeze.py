"""What a sweep is made of, fixed when it is submitted: its code, and each job's whole configuration.

outputs/<name>/sweep_<date_time>/
    sweep.json code/ slurm/ 0/ 1/ 2/ …          each with a job.yaml, and a run's files once it has begun

sweep.json: {"schema": 1, "began": unix s, "launcher": "slurm" or "local", "host", "pid", "cwd", "command":
[argv], "sbatch": flags of hydra.launcher, "jobs": [{"num", "overrides": [...], "swept": {key: value},
"job_id": "123_0" or null}]}.
`swept` are the overrides that differ between jobs; `job_id` is the newest submission's.
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
from gymexp.record.snapshot import snapshot

SCHEMA = 2  # raised when a job's function moves, or a file that this gymexp reads changes its meaning


@dataclass(frozen=True)
class FrozenJob:
    """One job of a sweep: its checked configuration, and the overrides that made it."""

    config: RunConfig
    overrides: list[str]


def freeze(sweep: Path, launcher: str, jobs: Mapping[int, FrozenJob], sbatch: Mapping[str, Any]) -> None:
    """Fix `jobs`, by number, in the sweep's directory; sweep.json is the last file. Those of an earlier call
    stay, as a sweeper may launch in batches, all of the same code."""
    said = read_sweep(sweep) if (sweep / "sweep.json").exists() else None
    if said is None:
        snapshot(sweep / "code", runnable=True)
        said = {
            "schema": SCHEMA,
            "launcher": launcher,
            **this_process(),
            "cwd": str(Path.cwd()),
            "command": [sys.executable, *sys.orig_argv[1:]],
            "sbatch": dict(sbatch),
            "jobs": [],
        }
    if taken := {entry["num"] for entry in said["jobs"]} & jobs.keys():
        raise RunDirectoryError(
            f"{sweep} holds a sweep already, with job {min(taken)}: choose another hydra.sweep.dir"
        )
    for num, job in jobs.items():
        write_job(sweep / str(num), job)
        said["jobs"].append({"num": num, "overrides": job.overrides, "swept": {}, "job_id": None})
    for job, swept in zip(said["jobs"], swept_of([job["overrides"] for job in said["jobs"]]), strict=True):
        job["swept"] = swept
    write_sweep(sweep, said)


def take_back(sweep: Path, nums: Iterable[int]) -> None:
    """Remove what Hydra and `freeze` wrote for jobs that were not submitted after all, and nothing else."""
    said = read_sweep(sweep) if (sweep / "sweep.json").exists() else {"jobs": []}
    if any(entry["job_id"] for entry in said["jobs"]):
        return
    for num in nums:
        (sweep / str(num) / "job.yaml").unlink(missing_ok=True)
    for made in ("code", "slurm"):
        shutil.rmtree(sweep / made, ignore_errors=True)
    for made in ("sweep.json", "multirun.yaml"):
        (sweep / made).unlink(missing_ok=True)
    for folder in (*(sweep / str(num) for num in nums), sweep):
        with contextlib.suppress(OSError):  # not there, or with something of the user's in it
            folder.rmdir()


def swept_of(jobs: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """The overrides that are not the same in all jobs, as key -> value, for each job.

    Overrides are `key=value`, `+key=value` or `~key`; a key's `+` is no part of it.
    """
    pairs = [{o.partition("=")[0].lstrip("+"): o.partition("=")[2] for o in job} for job in jobs]
    keys = list(dict.fromkeys(key for job in pairs for key in job))
    differ = [key for key in keys if len({job.get(key) for job in pairs}) > 1]
    return [{key: job[key] for key in differ if key in job} for job in pairs]


def name_of(num: int, swept: Mapping[str, str]) -> str:
    """What messages call a job: `job 3 (seed=1)`."""
    said = " ".join(f"{key}={value}" for key, value in swept.items())
    return f"job {num} ({said})" if said else f"job {num}"


def read_sweep(sweep: Path) -> dict[str, Any]:
    """What sweep.json says. Raises RunDirectoryError if there is none, or one of another gymexp."""
    try:
        said = json.loads((sweep / "sweep.json").read_text())
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{sweep} must be a sweep's directory with a sweep.json: {error}") from None
    if said.get("schema") != SCHEMA:
        made_by = f"PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(sweep.resolve() / 'code'))}"
        raise RunDirectoryError(
            f"{sweep / 'sweep.json'} must be of schema {SCHEMA}, got {said.get('schema')!r}: another version "
            "of gymexp made this sweep. Its jobs go on with their own code, and so does the command: "
            f"{made_by} python -m gymexp.sweep …"
        )
    return said


def claim(sweep: Path) -> None:
    """This process is the one that runs the jobs of a local sweep, from now on."""
    said = read_sweep(sweep)
    write_sweep(sweep, said | this_process())


def write_sweep(sweep: Path, said: Mapping[str, Any]) -> None:
    """Write sweep.json, which `read_sweep` reads."""
    replace_file(sweep / "sweep.json", json.dumps(said, indent=1) + "\n")


def write_job(directory: Path, job: FrozenJob) -> None:
    """Fix a job in `directory`/job.yaml."""
    directory.mkdir(parents=True, exist_ok=True)
    said = {"overrides": job.overrides, "config": dataclasses.asdict(job.config)}
    replace_file(directory / "job.yaml", OmegaConf.to_yaml(OmegaConf.create(said)))


def read_job(directory: Path) -> FrozenJob:
    """The job that `write_job` fixed in a directory, checked anew."""
    said: Any = OmegaConf.load(directory / "job.yaml")
    return FrozenJob(load(said.config), list(said.overrides))
