"""What other launchers leave in the environment, and torch, accelerate and DeepSpeed obey unasked.

A shell in a torchrun or mpirun, or a line in a profile, may set these. A trainer that found them would wait
for ranks that never come, or compute in another precision than model.dtype says. Each process of a run gets
an environment without them, in which gymexp sets what it means.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_LAUNCHERS = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_\w+"
    r"|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_\w+|FORK_LAUNCHED|CROSS_RANK|CROSS_SIZE"
    r"|(ACCELERATE|FSDP|PARALLELISM_CONFIG|MEGATRON_LM|DEEPSPEED|SMDATAPARALLEL)_\w+"
    r"|(PMI|PMIX|OMPI|MV2|I_MPI|MPI)_\w+"
)


def of_other_launchers(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The names of such variables, in order."""
    return sorted(name for name in environ if _LAUNCHERS.fullmatch(name))


def without_launchers(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without such variables."""
    dropped = set(of_other_launchers(environ))
    return {name: value for name, value in environ.items() if name not in dropped}


def forget_launchers() -> None:
    """Take such variables out of this process's own environment; to be called before torch is imported."""
    for name in of_other_launchers():
        del os.environ[name]
