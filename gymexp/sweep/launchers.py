"""What starts the jobs of `gymexp.train`: `launcher=local` here, `launcher=slurm` on a cluster."""

from __future__ import annotations

from typing import Any

from gymexp.cli.entry import BASIC, SUBMITIT


def local(**params: Any) -> Any:
    """The launcher of `launcher=local`."""
    from gymexp.sweep.local import LocalLauncher

    return LocalLauncher(**params)


def slurm(**params: Any) -> Any:
    """The launcher of `launcher=slurm`."""
    from gymexp.sweep.slurm import SlurmLauncher

    return SlurmLauncher(**params)


LAUNCHERS = {BASIC: local, SUBMITIT: slurm}
