"""The trainer's ranks: work that the first one does for all of them; devices of ranks without GPUs."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


T = TypeVar("T")

# Bytes of all ranks together that are sent at once. They take this much of a GPU's memory if the ranks talk
# by NCCL alone.
_MAX_SENT_BYTES = 1 << 26


def on_main_rank(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Calls `work` on the first rank only. Returns its result, or raises its exception, on every rank."""
    if accelerator.num_processes == 1:
        return work()
    return _tell(*(_try(work) if accelerator.is_main_process else (None, None)))


def part_of_main_rank(
    accelerator: Accelerator,
    work: Callable[[], Sequence[T]],
    pack: Callable[[T], Any],
    unpack: Callable[[Any], T],
) -> T:
    """Calls `work`, which returns a part for each rank, on the first rank only. Returns each rank its part,
    or raises the exception of `work` on every rank.

    Every rank is told whether the work succeeded, and then gets its own part alone. pack, unpack: a part as
    values to pickle, and back.
    """
    if accelerator.num_processes == 1:
        [part] = work()
        return part
    own: list[T] = []
    sent: list[bytes] = []

    def pack_parts() -> list[int]:
        parts = work()
        own.append(parts[0])
        sent.extend([b"", *(pickle.dumps(pack(part)) for part in parts[1:])])
        return [len(data) for data in sent]

    sizes = on_main_rank(accelerator, pack_parts)
    received = _scatter(accelerator, sent, sizes)
    return own[0] if accelerator.is_main_process else unpack(pickle.loads(received))


def gathered_on_main_rank(accelerator: Accelerator, own: Sequence[T]) -> list[T]:
    """Returns the first rank the values of all ranks, rank after rank; the others nothing. Every rank must
    call it.

    accelerate's `gather_object` sends everything to every rank, each part as long as the longest one. At 64
    ranks, a record of 12 MB that is one rank's alone would take 768 MB on each.
    """
    if accelerator.num_processes == 1:
        return list(own)
    import torch

    data = pickle.dumps(list(own))
    size = torch.tensor([len(data)], device=_device(accelerator))
    sizes = [torch.empty_like(size) for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather(sizes, size)
    parts = _gather(accelerator, data, [int(one) for one in sizes])
    return [value for part in parts for value in pickle.loads(part)]


def _try(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Returns the result of `work`, or its exception in a form in which every rank can raise it."""
    try:
        return work(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # A class may need arguments that pickle does not keep, and refuses with any error.
            told = RuntimeError(f"{type(error).__name__}: {error}")
            told.__cause__ = error
            return None, told
        return None, error


def _tell(result: T | None, error: Exception | None) -> T:
    """Returns the first rank's `result`, or raises its `error`, on every rank."""
    from accelerate.utils import broadcast_object_list

    box: list[Any] = [result, error]
    broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _scatter(accelerator: Accelerator, parts: Sequence[bytes], sizes: Sequence[int]) -> bytes:
    """Returns each rank's part, on that rank. parts: of all ranks, on the first rank. sizes: of the parts, on
    every rank."""
    import numpy as np
    import torch

    device = _device(accelerator)
    received = bytearray()
    for start, width in _pieces(sizes):
        piece = torch.empty(width, dtype=torch.uint8, device=device)
        rows = None
        if accelerator.is_main_process:
            padded = np.zeros((len(sizes), width), dtype=np.uint8)
            for row, part in zip(padded, parts, strict=True):
                data = np.frombuffer(part, dtype=np.uint8)[start : start + width]
                row[: data.size] = data
            rows = list(torch.from_numpy(padded).to(device).unbind())
        torch.distributed.scatter(piece, rows)
        received += piece.cpu().numpy().tobytes()
    return bytes(received[: sizes[accelerator.process_index]])


def _gather(accelerator: Accelerator, data: bytes, sizes: Sequence[int]) -> list[bytearray]:
    """Returns the first rank the parts of all ranks; the others none. data: this rank's part. sizes: of the
    parts, on every rank."""
    import numpy as np
    import torch

    device = _device(accelerator)
    parts = [bytearray() for _ in sizes] if accelerator.is_main_process else []
    for start, width in _pieces(sizes):
        padded = np.zeros(width, dtype=np.uint8)
        own = np.frombuffer(data, dtype=np.uint8)[start : start + width]
        padded[: own.size] = own
        piece = torch.from_numpy(padded).to(device)
        rows = [torch.empty_like(piece) for _ in parts]
        torch.distributed.gather(piece, rows or None)
        for part, size, row in zip(parts, sizes, rows, strict=False):  # none where nothing is received
            part += row[: max(0, size - start)].cpu().numpy().tobytes()
    return parts


def _pieces(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields the (start, width) of the pieces in which parts of these sizes are sent: torch sends pieces of
    equal size, of all ranks at once."""
    step = max(1, _MAX_SENT_BYTES // len(sizes))
    for start in range(0, max(sizes), step):
        yield start, min(step, max(sizes) - start)


def _device(accelerator: Accelerator) -> torch.device:
    """Returns the device of the tensors that the ranks can send to each other: the CPU unless they know NCCL
    alone."""
    import torch

    takes_cpu = "cpu:" in torch.distributed.get_backend_config()
    return torch.device("cpu") if takes_cpu else accelerator.device


@cache
def know_cpu_ranks() -> None:
    """Lets torch.load accept the devices cpu:0, cpu:1, …, which accelerate gives to ranks without GPUs. By
    itself torch.load accepts only cpu."""
    import torch

    torch.serialization.register_package(
        50, lambda _: None, lambda storage, device: storage if device.startswith("cpu:") else None
    )
