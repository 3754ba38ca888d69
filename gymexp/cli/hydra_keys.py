"""Hydra's own keys (`hydra.*`) and flags, and the effect of each in a training run and in a sweep.

CARRIED: Hydra obeys the key in both. SINGLE and SWEEP: the key has a meaning in only one of the two, and the
command line of the other refuses it. REFUSED: the key must keep its neutral value, as Hydra's launchers do
not start gymexp's runs. SLURM: keys of `hydra.launcher` with launcher=slurm that gymexp sets from keys of its
own. POPULATED: Hydra writes the key itself and overwrites any value of the user's. The tables leave out the
prefix `hydra.`; an entry stands for every key below it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobRuntime, configure_log
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gymexp.config.group_options import CONF_DIR
from gymexp.config.suggestions import nearest
from gymexp.errors import ConfigError

_SLURM = "submitit_slurm"
_GROUPS = {folder.name for folder in CONF_DIR.iterdir() if folder.is_dir()}
_SEARCH = "search.params.<key>={low: …, high: …} searches ranges by Optuna, as sweeps/search_lr.yaml does"

CARRIED = {
    "mode": "RUN or MULTIRUN",
    "searchpath": "more folders of options",
    "hydra_logging": "the log of Hydra itself",
    "help": "--help",
    "hydra_help": "--hydra-help",
    "job.config.override_dirname": "how ${hydra.job.override_dirname} is made",
    "launcher._target_": "launcher=… sets it",
    "sweeper._target_": "always Hydra's basic sweeper",
}

SINGLE = {
    "run.dir": "hydra.sweep.dir=… says where a sweep's runs are",
    "job.env_set": "set variables before the command, which passes its environment on to every job",
    "callbacks": "nothing serves in a sweep, whose jobs Hydra does not run",
    "verbose": "a job's own logs are in its run directory, under logs/",
}

SWEEP = {
    "sweep.dir": "hydra.run.dir=… or output_dir=… says where a single run is",
    "sweeper.params": "-m makes a sweep",
    "sweeper.max_batch_size": "-m makes a sweep",
}


@dataclass(frozen=True)
class Refusal:
    """Why a key accepts only the values of `neutral`, and what to do instead."""

    neutral: tuple[Any, ...]
    why: str
    instead: str


REFUSED = {
    "sweep.subdir": Refusal(
        ("${hydra.job.num}",),
        "as a sweep's runs are known by their numbers",
        "leave it out; hydra.sweep.dir=… says where they are",
    ),
    "job.chdir": Refusal(
        (None, False), "as relative paths start at the command's working directory", "leave it out"
    ),
    "job.env_copy": Refusal(([],), "as a job gets the whole environment", "leave it out"),
    "output_subdir": Refusal(
        (None,), "as the run directory has config.yaml and overrides.yaml of its own", "leave it out"
    ),
    "job_logging.root": Refusal(
        (None,), "as a run's logs are in its directory, under logs/", "leave hydra/job_logging out"
    ),
}

SLURM = {
    "submitit_folder": "hydra.sweep.dir",
    "timeout_min": "launcher.time",
    "mem_gb": "launcher.mem",
    "cpus_per_task": "launcher.cpus",
    "gpus_per_node": "launcher.gpus",
    "name": "name",
    "nodes": "placement.rollout_nodes and placement.train_nodes",
    "tasks_per_node": "placement (one task a node starts all)",
    "signal_delay_s": "launcher.signal_s",
    "array_parallelism": "launcher.array_parallelism",
    "stderr_to_stdout": "nothing: both are in one file",
    "max_num_timeout": "nothing: a job goes on after its time limit as long as it makes progress",
}
# Flags of sbatch that hydra.launcher.<flag> and launcher.<flag> can both set. Setting both is refused.
_EITHER = ("partition", "account", "qos")

POPULATED = (
    "job.name", "job.id", "job.num", "job.config_name", "job.override_dirname", "overrides", "runtime",
)  # fmt: skip


def check_flags(arguments: Sequence[str]) -> None:
    """Raises ConfigError for flags of Hydra's that contradict each other, or that a run would ignore."""
    flags, unread = get_args_parser().parse_known_args(list(arguments))
    if problem := next(_flag_problems(flags, unread), None):
        raise ConfigError(problem)


def _flag_problems(flags: argparse.Namespace, unread: list[str]) -> Iterator[str]:
    if flags.experimental_rerun is not None:
        yield "--experimental-rerun is not for gymexp's runs: resume=RUN goes on with a run"
    if unread and not any(argument.startswith("-") for argument in unread):
        yield f"overrides must stand together, without a flag between them, got {' '.join(unread)} apart"
    if flags.cfg and flags.multirun:
        yield (
            "--cfg shows one configuration and must be without --multirun: leave out -m and say one value a "
            "key; with -m launcher=slurm, launcher.dry_run=true shows each job's overrides instead"
        )
    if flags.package is not None and not flags.cfg:
        yield f"--package is for --cfg, got --package {flags.package} without it: say --cfg job as well"
    if flags.resolve and not (flags.cfg or flags.help):
        yield "--resolve is for --cfg, got it without: say --cfg job as well"
    commands = {
        "--run": flags.run,
        "--multirun": flags.multirun,
        "--cfg": flags.cfg,
        "--info": flags.info,
        "--shell-completion": flags.shell_completion,
    }
    if len(both := [name for name, is_set in commands.items() if is_set]) > 1:
        yield f"{' and '.join(both)} exclude each other: say one of them"
    if flags.shell_completion and not any(
        override.startswith(("install=", "uninstall=", "query=")) for override in flags.overrides
    ):
        yield "--shell-completion needs install=bash (or zsh, fish), uninstall=… or query=…"


def check_before_runs(launches: bool) -> None:
    """Patches Hydra so that a run or sweep starts only if every key of `hydra.*` can be obeyed.

    Hydra has no hook for such a check: its callbacks come after its logging, and they are themselves
    configured by these keys.

    launches: whether the command passes launchers of its own to `entry.hydra_main`. If not, Hydra runs the
    command itself and obeys its keys, so only repeated options are checked.
    """
    compose = Hydra.compose_config

    def composed(self: Hydra, *args: Any, with_log_configuration: bool = False, **more: Any) -> DictConfig:
        cfg = compose(self, *args, **more)
        check_options(cfg)
        if with_log_configuration:  # False when Hydra only shows the configuration
            if launches:
                check(cfg, sweep=more["run_mode"] == RunMode.MULTIRUN)
            configure_log(cfg.hydra.hydra_logging, cfg.hydra.verbose)
        return cfg

    Hydra.compose_config = composed


def check(cfg: DictConfig, sweep: bool) -> None:
    """Raises ConfigError with a line for each of Hydra's keys that would be ignored. cfg includes `hydra`."""
    if lines := list(problems(cfg, sweep)):
        raise ConfigError("\n".join(lines))


def check_options(cfg: DictConfig) -> None:
    """Raises ConfigError if an option is chosen twice, as in env=[sudoku,sudoku]. Hydra would use it once."""
    for override in OverridesParser.create().parse_overrides(list(cfg.hydra.overrides.task)):
        value = None if override.is_sweep_override() else override.value()
        if override.key_or_group in _GROUPS and isinstance(value, list):
            repeated = [name for index, name in enumerate(value) if name in value[:index]]
            if repeated:
                raise ConfigError(
                    f"{override.key_or_group} must name each of its options once, got {repeated[0]} twice: "
                    "env.<name>.like=… makes another environment of one"
                )


def problems(cfg: DictConfig, sweep: bool) -> Iterator[str]:
    """Yields a line for each of Hydra's keys that a run or sweep would ignore, and what to use instead."""
    plain: Any = OmegaConf.to_container(cfg.hydra, resolve=False)
    choices = plain["runtime"]["choices"]
    overrides = dict(_key_and_value(override) for override in plain["overrides"]["hydra"])
    launcher, sweeper = choices.get("hydra/launcher"), choices.get("hydra/sweeper")
    if launcher not in ("basic", _SLURM):
        yield f"hydra/launcher is set by launcher=local and launcher=slurm, got {launcher!r}: say one of them"
    if sweeper != "basic":
        yield f"hydra/sweeper must be basic, got {sweeper!r}. {_SEARCH}"
    if sweep and "hydra.mode=RUN" in plain["overrides"]["hydra"]:
        yield "hydra.mode=RUN and -m (--multirun) exclude each other: say one of them"
    if sweep and get_args_parser().parse_known_args()[0].run:
        yield "--run is for a single run, and launcher=slurm or hydra.mode=MULTIRUN makes a sweep: drop it"
    if launcher == _SLURM and not sweep:
        yield "hydra.mode must be MULTIRUN with launcher=slurm, also for one job, got RUN: leave it out"
    for key, value in overrides.items():
        if any(_below(key, table) for table in POPULATED):
            yield f"hydra.{key} is written by Hydra, got {value!r}: leave it out; name=… names a run"
        elif not sweep and (instead := _advice_for(key, SWEEP)):
            yield f"hydra.{key} is for a sweep, got {value!r} for a single run: {instead}"
        elif sweep and (instead := _advice_for(key, SINGLE)):
            yield f"hydra.{key} is for a single run, got {value!r} in a sweep: {instead}"
        elif key == "run.dir" and (other := next((k for k in ("output_dir", "resume") if cfg.get(k)), None)):
            yield f"hydra.run.dir must be left out with {other}, which says where a run is, got {value!r}"
    if plain["job"].get("name", "") not in ("", "???", JobRuntime.instance().get("name")) and (
        "job.name" not in overrides
    ):
        yield f"hydra.job.name is written by Hydra, got {plain['job']['name']!r}: name=… names a run"
    for key in SINGLE if sweep else ():
        if key == "job.env_set" and plain["job"]["env_copy"]:
            continue  # with job.env_copy Hydra fills job.env_set itself
        if key != "run.dir" and not _is_overridden(key, overrides) and _get(plain, key):
            yield f"hydra.{key} is for a single run, got {_get(plain, key)!r} in a sweep: {SINGLE[key]}"
    for key, refusal in REFUSED.items():
        if (value := _get(plain, key)) not in refusal.neutral:
            yield f"hydra.{key} must be {refusal.neutral[0]} {refusal.why}, got {value!r}: {refusal.instead}"
    if launcher == _SLURM:
        yield from _slurm_problems(plain["launcher"], cfg)
    if not isinstance(plain["verbose"], bool | str | list):
        yield f"hydra.verbose must be true, false or names of loggers, got {plain['verbose']!r}"


def explain_option(group: str, name: str) -> str:
    """Returns the error message for `<group>=<name>`, an option that Hydra's own group does not have."""
    if group == "hydra/sweeper":
        return f"{group}={name} is not known. {_SEARCH}"
    if group == "hydra/launcher":
        return f"{group}={name} is not known. launcher=local and launcher=slurm set it: say one of these"
    return f"{group}={name} is not known: leave it out"


def explain_sweep(kind: str) -> str:
    """Returns the error message for a sweep that Hydra's basic sweeper does not support.

    kind: interval, the only such sweep in Hydra's grammar.
    """
    return f"{kind}(…) does not list the values of a sweep: write a list, as in -m key=1,2,3. {_SEARCH}"


def explain_key(key: str) -> str:
    """Returns the error message for a key below `hydra` that cannot be set."""
    if key.startswith("hydra/"):
        return f"{key} is not a group of options: leave it out"
    if _below(key, "hydra.launcher"):
        return f"{key} is not a key of this launcher: hydra.launcher.<flag>=… is for launcher=slurm"
    place: Any = OmegaConf.structured(HydraConf)
    known: list[str] = []
    done = "hydra"
    for name in key.split(".")[1:]:
        if not OmegaConf.is_dict(place) or name not in place:
            break
        place, done = OmegaConf.select(place, name), f"{done}.{name}"
    if OmegaConf.is_dict(place):
        known = [str(name) for name in place]
    if known:
        unknown = key.removeprefix(f"{done}.").partition(".")[0]
        return (
            f"{key} is not a key of Hydra's{nearest(unknown, known, f'{done}.')}. Known keys: "
            f"{', '.join(known)}"
        )
    return f"{key} does not exist yet: add it by +{key}=…"


def _slurm_problems(launcher: dict[str, Any], cfg: DictConfig) -> Iterator[str]:
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    neutral: Any = OmegaConf.to_container(OmegaConf.structured(SlurmQueueConf), resolve=False)
    for key, instead in SLURM.items():
        if (value := launcher.get(key)) != neutral[key]:
            yield f"hydra.launcher.{key} is set by gymexp, got {value!r}: use {instead} instead"
    for key in _EITHER:
        own_value = OmegaConf.select(cfg, f"launcher.{key}")
        if launcher.get(key) is not None and own_value is not None:
            yield f"hydra.launcher.{key} and launcher.{key} set the same flag of sbatch: leave the first out"


def _key_and_value(override: str) -> tuple[str, str]:
    """Splits `+hydra.job.env_set.X=1` into ("job.env_set.X", "1"); a group (`hydra/launcher`) stays whole."""
    key, _, value = override.partition("=")
    return key.lstrip("+~").removeprefix("hydra."), value


def _below(key: str, table: str) -> bool:
    return key == table or key.startswith(f"{table}.")


def _advice_for(key: str, tables: dict[str, str]) -> str | None:
    return next((advice for table, advice in tables.items() if _below(key, table)), None)


def _is_overridden(table: str, overrides: dict[str, str]) -> bool:
    return any(_below(key, table) for key in overrides)


def _get(plain: dict[str, Any], key: str) -> Any:
    value: Any = plain
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return None if value == "???" else value
