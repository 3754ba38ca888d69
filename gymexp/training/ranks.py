"""The trainer's ranks: work that the first one does for all of them; devices of ranks without GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator


T = TypeVar("T")


def on_main_rank(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Calls `work` on the first rank only. Returns its result, or raises its exception, on every rank."""
    if accelerator.num_processes == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    box: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


@cache
def know_cpu_ranks() -> None:
    """Lets torch.load accept the devices cpu:0, cpu:1, …, which accelerate gives to ranks without GPUs. By
    itself torch.load accepts only cpu."""
    import torch

    torch.serialization.register_package(
        50, lambda _: None, lambda storage, device: storage if device.startswith("cpu:") else None
    )
