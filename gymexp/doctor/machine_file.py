"""The machine file conf/machine/default.yaml: this machine's own defaults, derived from its Slurm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gymexp.config.group_options import CONF_DIR
from gymexp.config.schema import LauncherConfig
from gymexp.doctor import slurm
from gymexp.doctor.finding import run_command
from gymexp.errors import ConfigError, RunDirectoryError
from gymexp.files import replace_file
from gymexp.record.places import cache_dir

PATH = CONF_DIR / "machine" / "default.yaml"


def write(force: bool) -> str:
    """Write the machine file and return its text.

    force: replace an existing file. Without it, raises ConfigError if the file exists. Raises
    RunDirectoryError if the file cannot be written.
    """
    if PATH.exists() and not force:
        raise ConfigError(f"{PATH} exists already: edit it, or replace it by --init --force")
    text = suggest()
    try:
        PATH.parent.mkdir(parents=True, exist_ok=True)
        replace_file(PATH, text)
    except OSError as error:
        raise RunDirectoryError(
            f"{PATH} cannot be written ({error.strerror}): gymexp is installed where you may not write. "
            "Use a checkout (pip install -e .), or say launcher.partition=… and so on with each command"
        ) from None
    return text


def suggest() -> str:
    """Returns the text of conf/machine/default.yaml for this machine."""
    lines = [
        "# @package _global_",
        "# This machine's own defaults, read after every other option; the command line overrides them.",
        "# Not in git. All keys: launcher.* in docs/reference.md.",
        f"# GPUs here: {_gpus()}",
        f"# Cache of NeMo Gym's venv and of data: {cache_dir()} (set the variable GYMEXP_CACHE",
        "#   to move it; jobs need it on a disk that all nodes share)",
    ]
    partitions = slurm.partitions() if shutil.which("sinfo") else []
    if isinstance(partitions, str):
        return "\n".join([*lines, f"# Slurm does not answer ({partitions}): no defaults."]) + "\n"
    if not partitions:
        return "\n".join([*lines, "# No Slurm on this machine, or no partition is up: no defaults."]) + "\n"
    chosen = next((partition for partition in partitions if partition.is_default), partitions[0])
    return "\n".join([*lines, "launcher:", *_launcher(chosen, partitions)]) + "\n"


def _launcher(chosen: slurm.Partition, partitions: list[slurm.Partition]) -> list[str]:
    """Returns the lines below `launcher:`, with defaults for jobs in the partition `chosen`."""
    accounts = slurm.accounts()
    time = LauncherConfig().time
    limit, default_time = chosen.minutes, slurm.minutes(time)
    if limit is not None and default_time is not None and limit < default_time:
        time = f"{int(limit // 60)}:{int(limit % 60):02}:00"
    known = "\n".join(f"  #   {slurm.describe(partition)}" for partition in partitions)
    return [
        f"  # Partitions that are up:\n{known}",
        f"  partition: {_yaml(chosen.name)}",
        "  # The account that pays for the hours; "
        + (f"yours: {', '.join(accounts)}" if accounts else "this Slurm lists no accounts of yours"),
        f"  account: {_yaml(accounts[0] if accounts else None)}",
        "  # At its end the run saves, and the job is queued again to continue",
        f"  time: {_yaml(time)}",
        "  # A whole node of that partition, for each job",
        f"  gpus: {_yaml(chosen.gpus or None)}",
        f"  cpus: {_yaml(chosen.cpus or None)}",
        f"  mem: {_yaml(f'{chosen.mem_mb}M' if chosen.mem_mb > 1 else None)}",
        "  # Jobs of a sweep that run at once",
        f"  array_parallelism: {min(LauncherConfig().array_parallelism, max(1, chosen.nodes))}",
        "  # An address that gets a mail at each job's end",
        "  mail: null",
        "  # Shell commands before each run, e.g. [module load cuda]",
        "  setup: []",
    ]


def _yaml(value: str | int | None) -> str:
    return json.dumps(value)


def _gpus() -> str:
    if not shutil.which("nvidia-smi"):
        return "none (no nvidia-smi)"
    result = run_command("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    lines = [line.strip() for line in result.out.splitlines() if line.strip()]
    if result.code != 0 or not lines:
        return f"nvidia-smi does not answer ({result.error})"
    return "; ".join(f"{lines.count(line)} × {line}" for line in dict.fromkeys(lines))


def remark(path: Path = PATH) -> str:
    """Returns a warning if the machine file is in an installed package, an empty text in a checkout."""
    if "site-packages" not in path.parts:
        return ""
    return f"{path} is in the installed package: installing gymexp anew removes it"
