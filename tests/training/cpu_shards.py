"""FSDP on CPUs, for tests."""

from __future__ import annotations

import os


def shard_on_cpus() -> None:
    """accelerate shards with FSDP where its backend is an accelerator's; torch itself does so on CPUs too."""
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    torch.distributed.init_process_group("gloo")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_HPU)
