"""Work that one of the trainer's processes does for all of them."""

from __future__ import annotations

from collections.abc import Callable
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
