"""conf/machine/default.yaml, this machine's own defaults, as its Slurm and its GPUs suggest them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gymexp.config.options import CONF_DIR
from gymexp.config.schema import LauncherConfig
from gymexp.doctor import slurm
from gymexp.doctor.finding import ask
from gymexp.errors import ConfigError, RunDirectoryError
from gymexp.files import replace_file
from gymexp.record.places import cache_dir

PATH = CONF_DIR / "machine" / "default.yaml"


def write(force: bool) -> str:
    """Write it and return its text. Raises ConfigError where there is one and `force` does not say to
    replace it."""
    if PATH.exists() and not force:
        raise ConfigError(f"{PATH} is there already: edit it, or replace it by --init --force")
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
    """The text of conf/machine/default.yaml for this machine."""
    lines = [
        "# @package _global_",
        "# This machine's own defaults, read after every other option; what a command line says goes before.",
        "# Not in git. All keys: launcher.* in docs/reference.md.",
        f"# GPUs here: {_gpus()}",
        f"# Cache of NeMo Gym's venv and of data: {cache_dir()} (GYMEXP_CACHE, a variable, moves it;",
        "#   jobs need it on a disk that all nodes share)",
    ]
    found = slurm.partitions() if shutil.which("sinfo") else []
    if isinstance(found, str) or not found:
        lines.append(
            f"# No Slurm{f' that answers ({found})' if isinstance(found, str) else ' here'}: no defaults."
        )
        return "\n".join(lines) + "\n"
    chosen = next((one for one in found if one.is_default), found[0])
    return "\n".join([*lines, "launcher:", *_launcher(chosen, found)]) + "\n"


def _launcher(chosen: slurm.Partition, found: list[slurm.Partition]) -> list[str]:
    mine = slurm.accounts()
    time = LauncherConfig().time
    limit, day = chosen.minutes, slurm.minutes(time)
    if limit is not None and day is not None and limit < day:
        time = f"{int(limit // 60)}:{int(limit % 60):02}:00"
    known = "\n".join(f"  #   {slurm.describe(one)}" for one in found)
    return [
        f"  # Partitions that are up:\n{known}",
        f"  partition: {_yaml(chosen.name)}",
        "  # Whom the hours are booked to: "
        + (f"yours are {', '.join(mine)}" if mine else "this Slurm keeps no accounts that it tells of"),
        f"  account: {_yaml(mine[0] if mine else None)}",
        "  # After it the run saves, and the job is queued again to go on",
        f"  time: {_yaml(time)}",
        "  # A whole node of that partition, for each job",
        f"  gpus: {_yaml(chosen.gpus or None)}",
        f"  cpus: {_yaml(chosen.cpus or None)}",
        f"  mem: {_yaml(f'{chosen.mem_mb}M' if chosen.mem_mb > 1 else None)}",
        "  # Jobs of a sweep that run at once",
        f"  array_parallelism: {min(LauncherConfig().array_parallelism, max(1, chosen.nodes))}",
        "  # An address that is told of each job's end",
        "  mail: null",
        "  # Shell commands before each run, e.g. [module load cuda]",
        "  setup: []",
    ]


def _yaml(value: str | int | None) -> str:
    return json.dumps(value)


def _gpus() -> str:
    if not shutil.which("nvidia-smi"):
        return "none (no nvidia-smi)"
    shown = ask("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    lines = [line.strip() for line in shown.out.splitlines() if line.strip()]
    if shown.code != 0 or not lines:
        return f"nvidia-smi does not answer ({shown.error})"
    return "; ".join(f"{lines.count(line)} × {line}" for line in dict.fromkeys(lines))


def remark(path: Path = PATH) -> str:
    """What is to be known of where it lies; empty in a checkout."""
    if "site-packages" not in path.parts:
        return ""
    return f"{path} lies in the installed package: installing gymexp anew removes it"
