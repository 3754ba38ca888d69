"""The configuration of the run that the doctor checks, composed as `gymexp.train` does, with this machine's
own defaults."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import open_dict

from gymexp.cli import catalogue_source
from gymexp.cli.terminal import explain
from gymexp.config.group_options import CONF_DIR
from gymexp.config.hydra_schema import register
from gymexp.config.load import load
from gymexp.config.schema import RunConfig
from gymexp.doctor.finding import Finding, Subject
from gymexp.doctor.machine_file import PATH
from gymexp.errors import ConfigError


def composed(overrides: Sequence[str]) -> tuple[Subject, list[Finding]]:
    """Returns the run to check, and the findings about its configuration.

    If the machine file is wrong, a finding says so, and the run is composed without that file. After any
    other mistake the returned run is the default one.
    """
    register()
    catalogue_source.register()
    result = _try(overrides)
    if isinstance(result, Subject):
        machine_file = [Finding("ok", "machine file", str(PATH))] if PATH.exists() else []
        configuration = Finding("ok", "configuration", " ".join(overrides) or "the defaults")
        return result, [configuration, *machine_file]
    without_file = _try([*overrides, "~machine"]) if PATH.exists() else result
    if isinstance(without_file, Subject):
        fix = "correct it, or write it anew: python -m gymexp.doctor --init --force"
        return without_file, [Finding("fail", "machine file", f"{PATH}: {result}", fix)]
    fix = "correct it, in the form that python -m gymexp.train takes; the other checks use the defaults"
    default_run = _try(["~machine"]) if PATH.exists() else _try([])
    assert isinstance(default_run, Subject), default_run
    return default_run, [Finding("fail", "configuration", without_file, fix)]


def _try(overrides: Sequence[str]) -> Subject | str:
    """Returns the run that the overrides compose, or the error as a text."""
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose("train", list(overrides), return_hydra_config=True)
        launcher = cfg.hydra.runtime.choices.get("launcher", "local")
        with open_dict(cfg):
            del cfg["hydra"]
        return Subject(load(cfg), launcher)
    except HydraException as error:
        lines = explain(error, RunConfig).splitlines()
        return "\n".join(line for line in lines if not line.startswith("    "))  # without Hydra's own types
    except ConfigError as error:
        return str(error)
