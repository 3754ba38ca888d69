"""Variables of the user's environment that tell torch, accelerate and DeepSpeed how a launcher started them.

gymexp starts the processes of a run itself, from `python -m gymexp.train`. A launcher above that (torchrun,
`accelerate launch`, mpirun, srun, a notebook that left RANK behind) did not start them: its variables would
make a trainer wait for ranks that do not exist, or compute in another precision. No process of a run inherits
them. gymexp then sets what it means (`gymexp.run.services`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

# Which process of how many this is, and where they meet.
_RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
    "FORK_LAUNCHED",
)
_RANK_FAMILIES = (
    "TORCHELASTIC_",
    "PMI_",
    "PMIX_",
    "OMPI_",
    "MPI_LOCAL",
    "MV2_COMM_WORLD_",
    "SMDATAPARALLEL_",
)
# How to train, as `accelerate launch` passes it on; a user may have set it by hand and believe that it acts.
_SETTING_FAMILIES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# accelerate's own that change nothing in what is computed, and that act as their user means.
_HARMLESS = (
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_ENABLE_RICH",
    "ACCELERATE_LOG_LEVEL",
)
# Where gymexp has what such a variable says; the first beginning that fits.
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


def inherited(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environ` without the variables of a launcher: what a process of a run starts with."""
    return {name: value for name, value in environ.items() if not (_is_rank(name) or _is_setting(name))}


def unused(environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """A line for each variable that a user may believe to act on the training, with the key that does."""
    for name in sorted(filter(_is_setting, environ)):
        key = next((key for beginning, key in _KEYS.items() if name.startswith(beginning)), None)
        fix = f"say {key}" if key else "gymexp has nothing of the kind"
        yield f"{name}={environ[name]} is not used, as gymexp starts the trainer itself: {fix}"


def drop_launchers() -> None:
    """Make this process's own environment one of `inherited`, before it imports torch."""
    for name in os.environ.keys() - inherited():
        del os.environ[name]


def _is_rank(name: str) -> bool:
    return name in _RANKS or name.startswith(_RANK_FAMILIES)


def _is_setting(name: str) -> bool:
    return name.startswith(_SETTING_FAMILIES) and name not in _HARMLESS
