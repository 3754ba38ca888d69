"""What a submitted job calls: the run of one directory of a sweep, from what was frozen at submission.

Pickled by reference, so that the code is the sweep's own snapshot; needs no Hydra. A run over several nodes
calls it on each: task 0 leads, the others do what it says.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gymexp.launch.freeze import FrozenJob, read_job
from gymexp.run import agent
from gymexp.run.nodes import announce, read_task
from gymexp.run.placement import num_nodes
from gymexp.train import train


def run(sweep_dir: str, num: int) -> dict[str, Any]:
    """The run of job `num`: a new one, or on with the one that its directory holds.

    Empty where another node leads.
    """
    directory = Path(sweep_dir) / str(num)
    job = read_job(directory)
    task = read_task() if num_nodes(job.config.placement) > 1 else None
    if task is None:
        return _lead(directory, job)
    if task.rank > 0:
        agent.follow(directory, task)
        return {}
    try:
        return _lead(directory, job)
    except BaseException as error:
        announce(directory, task, error=str(error) or type(error).__name__)  # whom it has not called yet
        raise


def _lead(directory: Path, job: FrozenJob) -> dict[str, Any]:
    if (directory / "config.yaml").exists():
        return train(dataclasses.replace(job.config, resume=str(directory)), [], directory)
    return train(job.config, job.overrides, directory)
