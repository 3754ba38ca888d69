"""Removes environment variables of other launchers, which torch, accelerate and DeepSpeed would obey.

A shell inside torchrun or mpirun, or a line in a profile, may set such variables. A trainer that inherited
them would wait for ranks that never start, or compute in another precision than model.dtype. So each process
of a run gets an environment without them, and gymexp sets those that it needs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

_LAUNCHERS = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_\w+"
    r"|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_\w+|FORK_LAUNCHED"
    r"|(ACCELERATE|FSDP|PARALLELISM_CONFIG|MEGATRON_LM|DEEPSPEED|SMDATAPARALLEL)_\w+"
    r"|(PMI|PMIX|OMPI|MV2|I_MPI|MPI)_\w+|CROSS_RANK|CROSS_SIZE"
)
# Variables that a user may expect to have an effect, and the key to set instead. A name is a prefix of the
# variable's; the first prefix that matches counts.
_KEYS = {
    "ACCELERATE_MIXED_PRECISION": "model.dtype",
    "ACCELERATE_DOWNCAST_BF16": "model.dtype",
    "ACCELERATE_FP8_": "model.dtype",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "trainer.gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "trainer.max_grad_norm",
    "ACCELERATE_DYNAMO_": "trainer.torch_compile",
    "ACCELERATE_USE_FSDP": "trainer.fsdp",
    "FSDP_": "trainer.fsdp_config",
    "ACCELERATE_USE_DEEPSPEED": "trainer.deepspeed",
    "ACCELERATE_DEEPSPEED_": "trainer.deepspeed",
    "ACCELERATE_CONFIG_DS_FIELDS": "trainer.deepspeed",
    "ACCELERATE_USE_CPU": "CUDA_VISIBLE_DEVICES",
    "ACCELERATE_TORCH_DEVICE": "CUDA_VISIBLE_DEVICES",
}


def of_other_launchers(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the sorted names of the variables in `environ` that belong to other launchers."""
    return sorted(name for name in environ if _LAUNCHERS.fullmatch(name))


def remarks(environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Yields warnings about other launchers' variables: first those that a key replaces, then the rest."""
    others = of_other_launchers(environ)
    keys = {name: next((k for start, k in _KEYS.items() if name.startswith(start)), None) for name in others}
    for name, key in keys.items():
        if key:
            yield f"{name}={environ[name]} is not used, as gymexp starts the trainer itself: say {key}"
    if rest := [name for name, key in keys.items() if not key]:
        yield f"not used, as another launcher's: {' '.join(rest)}; see placement.*"


def without_launchers(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns a copy of the environment without other launchers' variables."""
    dropped = set(of_other_launchers(environ))
    return {name: value for name, value in environ.items() if name not in dropped}


def forget_launchers() -> None:
    """Removes other launchers' variables from this process's environment. Call it before importing torch."""
    for name in of_other_launchers():
        del os.environ[name]
