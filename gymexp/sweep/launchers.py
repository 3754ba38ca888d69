"""The launchers of `gymexp.train`'s jobs: `launcher=local` on this machine, `launcher=slurm` on a cluster."""

from __future__ import annotations

from typing import Any

from gymexp.cli.entry import BASIC, SUBMITIT


def local(**params: Any) -> Any:
    """Returns the launcher of `launcher=local`."""
    from gymexp.sweep.local import LocalLauncher

    return LocalLauncher(**params)


def slurm(**params: Any) -> Any:
    """Returns the launcher of `launcher=slurm`."""
    from gymexp.sweep.slurm import SlurmLauncher

    return SlurmLauncher(**params)


LAUNCHERS = {BASIC: local, SUBMITIT: slurm}
