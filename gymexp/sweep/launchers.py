"""The launchers of the jobs of `gymexp.train` and `gymexp.evaluate`: `launcher=local` on this machine,
`launcher=slurm` on a cluster."""

from __future__ import annotations

from typing import Any

from gymexp.cli.entry import BASIC, SUBMITIT


def local(**params: Any) -> Any:
    """Returns the launcher of `launcher=local` for training runs."""
    from gymexp.sweep.kinds import TRAINING
    from gymexp.sweep.local import LocalLauncher

    return LocalLauncher(TRAINING, **params)


def slurm(**params: Any) -> Any:
    """Returns the launcher of `launcher=slurm` for training runs."""
    from gymexp.sweep.kinds import TRAINING
    from gymexp.sweep.slurm import SlurmLauncher

    return SlurmLauncher(TRAINING, **params)


def local_evaluations(**params: Any) -> Any:
    """Returns the launcher of `launcher=local` for evaluations."""
    from gymexp.sweep.kinds import EVALUATIONS
    from gymexp.sweep.local import LocalLauncher

    return LocalLauncher(EVALUATIONS, **params)


def slurm_evaluations(**params: Any) -> Any:
    """Returns the launcher of `launcher=slurm` for evaluations."""
    from gymexp.sweep.kinds import EVALUATIONS
    from gymexp.sweep.slurm import SlurmLauncher

    return SlurmLauncher(EVALUATIONS, **params)


LAUNCHERS = {BASIC: local, SUBMITIT: slurm}
EVALUATION_LAUNCHERS = {BASIC: local_evaluations, SUBMITIT: slurm_evaluations}
