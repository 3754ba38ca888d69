"""From `launcher.*` to what submitit's Slurm executor is asked for."""

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
    """The flags of `hydra.launcher` that go to sbatch as they are; those that are set."""
    return {key: value for key, value in params.items() if key not in SLURM and value not in (None, {})}


def asks_for_gpus(more: Mapping[str, Any]) -> bool:
    """Whether some flag of `extras` does, in place of launcher.gpus."""
    flags = {**more, **more.get("additional_parameters", {})}
    return any("gpu" in key or ("gres" in key and "gpu" in str(value)) for key, value in flags.items())


def parameters(config: RunConfig, more: Mapping[str, Any], sweep: Path, cwd: str) -> dict[str, Any]:
    """For `submitit.SlurmExecutor.update_parameters`. more: `extras`; `launcher.*` goes before them.
    cwd: where the sweep was submitted first, and so where its relative paths begin.

    One task a node. A job's Python finds the sweep's own code before any other, and not the working
    directory's, which `python -m` would put first.
    """
    launcher, code = config.launcher, shlex.quote(str(sweep / "code"))
    flags = {"requeue": True, "chdir": cwd, **more.get("additional_parameters", {})}
    if launcher.mem is not None:
        flags["mem"] = launcher.mem
    asked = {
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "gpus_per_node": launcher.gpus,
        "cpus_per_task": launcher.cpus,
        "mail_user": launcher.mail,
        "mail_type": "END,FAIL" if launcher.mail else None,
    }
    setup = [
        "export SLURM_KILL_BAD_EXIT=1",  # a task that ends badly ends the others
        "export PYTHONSAFEPATH=1",
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export GYMEXP_SERVERS={code}",
    ]
    return {
        **{key: value for key, value in more.items() if key != "additional_parameters"},
        **{key: value for key, value in asked.items() if value is not None},
        "job_name": config.name,
        "time": launcher.time,
        "nodes": num_nodes(config.placement),
        "ntasks_per_node": 1,
        "signal_delay_s": launcher.signal_s,
        "array_parallelism": launcher.array_parallelism,
        "stderr_to_stdout": True,
        "wckey": None,  # submitit has one of its own, which clusters that keep a list would refuse
        "setup": [*setup, *more.get("setup", []), *launcher.setup],
        "srun_args": _container(launcher.container, launcher.container_mounts, sweep, cwd),
        "additional_parameters": flags,
    }


def _container(image: str | None, mounts: list[str], sweep: Path, cwd: str) -> list[str]:
    """pyxis' flags. What is mounted at its own path: working directory, sweep, cache, and this Python."""
    if image is None:
        return []
    own = dict.fromkeys(str(p) for p in (cwd, sweep, cache_dir(), sys.prefix, sys.base_prefix))
    listed = ",".join([*(f"{path}:{path}" for path in own), *mounts])
    return [
        f"--container-image={image}",
        f"--container-mounts={listed}",
        f"--container-workdir={cwd}",
    ]
