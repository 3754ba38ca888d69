"""The run that is asked about, composed as `gymexp.train` would; and this machine's own defaults in it."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import open_dict

from gymexp.cli.terminal import explain
from gymexp.config.hydra_schema import register
from gymexp.config.load import load
from gymexp.config.options import CONF_DIR
from gymexp.config.schema import RunConfig
from gymexp.doctor.finding import Finding, Subject
from gymexp.doctor.machine_file import PATH
from gymexp.errors import ConfigError


def composed(overrides: Sequence[str]) -> tuple[Subject, list[Finding]]:
    """What is to be checked, and whether its configuration holds.

    A machine file that breaks it is told as such and left out; other mistakes leave the defaults to check.
    """
    register()
    error = _try(overrides)
    if isinstance(error, Subject):
        found = [Finding("ok", "machine file", str(PATH))] if PATH.exists() else []
        return error, [Finding("ok", "configuration", " ".join(overrides) or "the defaults"), *found]
    without = _try([*overrides, "~machine"]) if PATH.exists() else error
    if isinstance(without, Subject):
        fix = "mend it, or write it anew: python -m gymexp.doctor --init --force"
        return without, [Finding("fail", "machine file", f"{PATH}: {error}", fix)]
    fix = "the rest is checked for the defaults: say it as python -m gymexp.train takes it"
    bare = _try(["~machine"]) if PATH.exists() else _try([])
    assert isinstance(bare, Subject), bare
    return bare, [Finding("fail", "configuration", without, fix)]


def _try(overrides: Sequence[str]) -> Subject | str:
    """What is composed, or what is wrong with it."""
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose("train", list(overrides), return_hydra_config=True)
        launcher = cfg.hydra.runtime.choices.get("launcher", "local")
        with open_dict(cfg):
            del cfg["hydra"]
        return Subject(load(cfg), launcher)
    except HydraException as error:
        said = explain(error, RunConfig).splitlines()
        return "\n".join(line for line in said if not line.startswith("    "))  # Hydra's own types
    except ConfigError as error:
        return str(error)
