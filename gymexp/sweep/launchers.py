"""What starts the jobs of `gymexp.train`: `launcher=local` here, `launcher=slurm` on a cluster."""

from __future__ import annotations

from typing import Any

from gymexp.cli.entry import BASIC, SUBMITIT


def local(**params: Any) -> Any:
    from gymexp.sweep.local import LocalLauncher

    return LocalLauncher(**params)


def slurm(**params: Any) -> Any:
    from gymexp.sweep.slurm import SlurmLauncher

    return SlurmLauncher(**params)


LAUNCHERS = {BASIC: local, SUBMITIT: slurm}
