"""The folder of the configuration's YAML files, and the options of its groups."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


CONF_DIR = next(d for d in (_PACKAGE.parent / "conf", _PACKAGE / "conf") if (d / "train.yaml").exists())


def options(group: str) -> list[str]:
    """Returns the sorted names of a config group's options, e.g. `options("env")`."""
    return sorted(p.stem for p in (CONF_DIR / group).glob("*.yaml"))
