"""The folders that Hydra makes for a run or a sweep, with their parents, before a command can check anything.

They stay empty after a mistake in the command, and if the run has a directory elsewhere (resume, output_dir).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf


@contextlib.contextmanager
def removed_if_empty() -> Iterator[Callable[[], None]]:
    """Removes the folders that Hydra makes within the context and that are empty at its end, and at each call
    of the function that it yields. A folder that was there before stays.

    Hydra has no hook between the configuration, which says where the folders are, and their making, so its
    method is patched within the context.
    """
    missing: list[Path] = []
    compose = Hydra.compose_config

    def composed(self: Hydra, *args: Any, with_log_configuration: bool = False, **more: Any) -> DictConfig:
        cfg = compose(self, *args, with_log_configuration=with_log_configuration, **more)
        if with_log_configuration:  # False when Hydra only shows the configuration
            missing[:] = _missing(cfg, more["run_mode"])
        return cfg

    def remove() -> None:
        for folder in missing:
            with contextlib.suppress(OSError):  # it has files, or is gone
                folder.rmdir()

    Hydra.compose_config = composed
    try:
        yield remove
    finally:
        Hydra.compose_config = compose
        remove()


def _missing(cfg: DictConfig, mode: RunMode) -> list[Path]:
    """Returns the directory of the run or the sweep and its parents, if they do not exist, inner first."""
    key = "hydra.run.dir" if mode == RunMode.RUN else "hydra.sweep.dir"
    hydra: Any = HydraConfig.instance()
    before, hydra.cfg = hydra.cfg, cfg  # for ${hydra:…}, as Hydra does
    try:
        path = Path(str(OmegaConf.select(cfg, key))).absolute()
    finally:
        hydra.cfg = before
    return [folder for folder in (path, *path.parents) if not folder.exists()]
