"""The entry point of a command that Hydra configures: its flags, its launchers, its run directory."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig

from gymexp.cli import catalogue_source, completion, empty_folders, hydra_keys, variants
from gymexp.cli.terminal import end_with, guarded, log_to_terminal, outlive_readers
from gymexp.config.group_options import CONF_DIR
from gymexp.config.hydra_schema import register
from gymexp.config.redaction import in_override
from gymexp.config.schema import RunConfig
from gymexp.errors import ConfigError, GymexpError

Job = Callable[[DictConfig], Any]
Launchers = Mapping[str, Callable[..., Any]]
# The names under which Hydra looks for the launchers of conf/launcher/.
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


def hydra_main(
    config_name: str, schema: type = RunConfig, launchers: Launchers | None = None
) -> Callable[[Job], Callable[[], Any]]:
    """`hydra.main` over gymexp's configuration. Every user error is printed as text that names a fix.

    launchers: functions that start the command's jobs, in place of Hydra's classes BASIC and SUBMITIT. Hydra
    looks plugins up by name, so each must be a function of a module. None: the command works in this process
    alone.
    """

    def decorate(main: Job) -> Callable[[], Any]:
        if completion.is_install_request(sys.argv[1:]):
            return lambda: print(completion.script())
        register()
        catalogue_source.register()
        variants.register()
        plugins: Any = Plugins.instance()
        plugins.class_name_to_class |= launchers or {SUBMITIT: _no_launcher}
        hydra_keys.check_before_runs(launchers is not None)
        # Without this variable Hydra prints its own errors and exits; with it, `guarded` gets them.
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        if launchers:
            outlive_readers()
        log_to_terminal()
        as_hydras = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)

        def check_flags_and_run() -> Any:
            hydra_keys.check_flags(sys.argv[1:])
            if {"-h", "--help"} & set(sys.argv[1:]):
                print(inspect.cleandoc(sys.modules[main.__module__].__doc__ or ""), end="\n\n", flush=True)
            with empty_folders.removed_if_empty() as remove_folders:
                return as_hydras(_ending(main, remove_folders))()

        return guarded(_without_secrets(check_flags_and_run), schema)

    return decorate


def _no_launcher(**_: Any) -> Any:
    return BasicLauncher()


def _without_secrets(main: Callable[[], Any]) -> Callable[[], Any]:
    """Wraps `main`: a secret on the command line raises ConfigError before Hydra saves the overrides."""

    @functools.wraps(main)
    def wrapped() -> Any:
        for key in filter(None, map(in_override, sys.argv[1:])):
            instead = "set the variable of the environment that the program reads"
            if ".servers." in key:
                instead = f"name the variable of the environment that has it, by {key}.key_env=…"
            raise ConfigError(
                f"{key} must hold no secret, as other users see the command line (ps), and run directories "
                f"keep it: leave it out, and {instead}"
            )
        return main()

    return wrapped


def _ending(main: Job, remove_folders: Callable[[], None]) -> Job:
    """Wraps `main` so that the folders that Hydra made for it are removed first if its directory is another.

    A GymexpError of a single run ends the process in this wrapper, because Hydra would print a line of its
    own above it. A GymexpError of a sweep passes, as it names the job.
    """

    @functools.wraps(main)
    def wrapped(cfg: DictConfig) -> Any:
        if cfg.get("resume") or cfg.get("output_dir"):
            remove_folders()
        try:
            return main(cfg)
        except GymexpError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            end_with(error)

    return wrapped
