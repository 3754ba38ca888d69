"""The translation of `launcher.*` to the parameters of submitit's Slurm executor."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gymexp.cli.hydra_keys import SLURM
from gymexp.cluster.placement import num_nodes
from gymexp.config.schema import RunConfig
from gymexp.record.places import cache_dir


def extras(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags of `hydra.launcher` that are set and that sbatch gets as they are."""
    return {key: value for key, value in params.items() if key not in SLURM and value not in (None, {})}


def asks_for_gpus(extra_flags: Mapping[str, Any]) -> bool:
    """Returns whether a flag of `extras` asks for GPUs, in place of launcher.gpus."""
    flags = {**extra_flags, **extra_flags.get("additional_parameters", {})}
    return any("gpu" in key or ("gres" in key and "gpu" in str(value)) for key, value in flags.items())


def parameters(config: RunConfig, extra_flags: Mapping[str, Any], sweep: Path, cwd: str) -> dict[str, Any]:
    """Returns one job's arguments for `submitit.SlurmExecutor.update_parameters`, with one task a node.

    extra_flags: from `extras`; keys of `launcher.*` override them. cwd: the working directory of the first
    submission, where the sweep's relative paths begin.

    PYTHONPATH makes a job import the sweep's copy of the code before any other, and PYTHONSAFEPATH keeps
    `python -m` from putting the working directory first.
    """
    launcher, code = config.launcher, shlex.quote(str(sweep / "code"))
    flags = {"requeue": True, "chdir": cwd, **extra_flags.get("additional_parameters", {})}
    if launcher.mem is not None:
        flags["mem"] = launcher.mem
    own_flags = {
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "gpus_per_node": launcher.gpus,
        "cpus_per_task": launcher.cpus,
        "mail_user": launcher.mail,
        "mail_type": "END,FAIL" if launcher.mail else None,
    }
    setup = [
        "export SLURM_KILL_BAD_EXIT=1",  # a task that fails ends the job's other tasks
        "export PYTHONSAFEPATH=1",
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export GYMEXP_SERVERS={code}",
    ]
    return {
        **{key: value for key, value in extra_flags.items() if key != "additional_parameters"},
        **{key: value for key, value in own_flags.items() if value is not None},
        "job_name": config.name,
        "time": launcher.time,
        "nodes": num_nodes(config.placement),
        "ntasks_per_node": 1,
        "signal_delay_s": launcher.signal_s,
        "array_parallelism": launcher.array_parallelism,
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's default key is refused by clusters that keep a list of keys
        "setup": [*setup, *extra_flags.get("setup", []), *launcher.setup],
        "srun_args": _container(launcher.container, launcher.container_mounts, sweep, cwd),
        "additional_parameters": flags,
    }


def _container(image: str | None, mounts: list[str], sweep: Path, cwd: str) -> list[str]:
    """Returns the flags of pyxis for srun, none without an image.

    The working directory, the sweep, the cache and this Python are mounted at their own paths.
    """
    if image is None:
        return []
    own_paths = dict.fromkeys(str(p) for p in (cwd, sweep, cache_dir(), sys.prefix, sys.base_prefix))
    all_mounts = ",".join([*(f"{path}:{path}" for path in own_paths), *mounts])
    return [
        f"--container-image={image}",
        f"--container-mounts={all_mounts}",
        f"--container-workdir={cwd}",
    ]
