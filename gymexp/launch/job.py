"""What a submitted job calls: the run of one directory of a sweep, from what was frozen at submission.

Pickled by reference, so that the code is the sweep's own snapshot; needs no Hydra.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gymexp.launch.freeze import read_job
from gymexp.train import train


def run(sweep_dir: str, num: int) -> dict[str, Any]:
    """The run of job `num`: a new one, or on with the one that its directory holds."""
    directory = Path(sweep_dir) / str(num)
    job = read_job(directory)
    config = job.config
    if (directory / "config.yaml").exists():
        config = dataclasses.replace(config, resume=str(directory))
        return train(config, [], directory)
    return train(config, job.overrides, directory)
