"""What the trainer's processes do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator


T = TypeVar("T")


def on_main_rank(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns, or raises, on the first rank: on every rank."""
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
