"""What the first rank does for all of them, with real ranks that talk by gloo."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import socket
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gymexp.errors import Interrupted, RolloutError
from gymexp.rollout.trained import Trained
from gymexp.training import ranks

PATIENCE_S = 120
SIZES = [5, 0, 3000]  # bytes of each rank's part


def made_up(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def failing(error: Exception) -> Any:
    raise error


def join(rank: int, world: int, port: int) -> Any:
    """Joins the ranks, and returns the part of an accelerator that `ranks` looks at."""
    import torch
    from accelerate.state import PartialState

    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in variables.items()}
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    return SimpleNamespace(
        num_processes=world, process_index=rank, is_main_process=rank == 0, device=state.device
    )


def count_received(rank: int) -> list[int]:
    """Returns a list that gets the bytes of each tensor that this rank is sent from now on."""
    import torch

    received: list[int] = []
    scatter, broadcast = torch.distributed.scatter, torch.distributed.broadcast

    def counted(call: Any) -> Any:
        def wrapper(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if rank:
                received.append(tensor.numel() * tensor.element_size())
            return call(tensor, *args, **kwargs)

        return wrapper

    torch.distributed.scatter = counted(scatter)
    torch.distributed.distributed_c10d.broadcast = counted(broadcast)
    return received


def as_a_rank_that_tells(rank: int, world: int, port: int, answers: Any) -> None:
    """Gathers the records of rollouts on the first rank. The last has a long one, the second none."""
    from accelerate.utils import gather_object

    accelerator = join(rank, world, port)
    received = count_gathered()
    ranks._MAX_SENT_BYTES = 3 * 1000

    def gathered(own: list[Trained]) -> Any:
        del received[:]
        found = ranks.gathered_on_main_rank(accelerator, own)
        ours = sum(received)
        # accelerate's own way is the reference.
        everyones = gather_object(own)
        return [in_words(one) for one in found], [in_words(one) for one in everyones], ours

    answers.put((rank, [gathered(records_of(rank, long)) for long in (10, 20_000)]))
    answers.close()
    answers.join_thread()


def records_of(rank: int, num_tokens: int) -> list[Trained]:
    if rank == 1:
        return []
    logprobs = np.arange(num_tokens, dtype=np.float32) if rank == 2 else np.zeros(3, np.float32)
    return [Trained(None, 0), Trained(rank / 8, num_tokens, 1.5, logprobs, weights=0.25)]


def in_words(one: Trained) -> Any:
    values = dataclasses.asdict(one)
    return values | {
        "logprobs": None if one.logprobs is None else (one.logprobs.dtype.str, one.logprobs.tolist())
    }


def count_gathered() -> list[int]:
    """Returns a list that gets the bytes of each tensor that this rank receives in a gather from now on."""
    import torch

    received: list[int] = []
    gather = torch.distributed.gather

    def counted(tensor: Any, rows: Any = None, **options: Any) -> Any:
        received.extend(row.numel() * row.element_size() for row in rows or ())
        return gather(tensor, rows, **options)

    torch.distributed.gather = counted
    return received


@pytest.mark.ranks
def test_the_first_rank_alone_gets_the_records_of_all_ranks_in_pieces():
    by_rank = answers_of(as_a_rank_that_tells, 3)
    for case, long in enumerate((10, 20_000)):
        found, everyones, received = by_rank[0][case]
        assert (
            len(found) == 4
            and found == everyones
            and max(len(one["logprobs"][1]) for one in found[1::2]) == long
        )
        assert received < 3 * (4 * 20_000 + 2_000)
        for rank in (1, 2):
            assert by_rank[rank][case][0] == [] and by_rank[rank][case][2] == 0


def as_a_rank(rank: int, world: int, port: int, answers: Any) -> None:
    accelerator = join(rank, world, port)
    received = count_received(rank)
    ranks._MAX_SENT_BYTES = 3 * 1000  # so that the largest part is sent in three pieces

    def part(work: Any) -> Any:
        called: list[int] = []
        work_once = lambda: (called.append(1), work())[1]  # noqa: E731
        del received[:]
        try:
            got = ranks.part_of_main_rank(accelerator, work_once, lambda data: data, lambda data: data)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
        return got, len(called), sum(received)

    answers.put((rank, [
        part(lambda: [made_up(size) for size in SIZES]),
        part(lambda: failing(RolloutError("too many failed"))),
        part(lambda: failing(Interrupted(15, "no arguments that pickle keeps"))),
        part(lambda: [lambda: "is not pickled"] * world),
        part(lambda: [made_up(size) for size in (50_000, 50_000, 50_000)]),
        part(lambda: [made_up(size) for size in (9, 9, 9)]),
    ]))  # fmt: skip
    answers.close()
    answers.join_thread()


def answers_of(work: Any, world: int) -> dict[int, Any]:
    """What `work` answers as each of `world` ranks, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = spawn.Queue()
    started = [spawn.Process(target=work, args=(rank, world, port, answers)) for rank in range(world)]
    for one in started:
        one.start()
    try:
        by_rank = dict(answers.get(timeout=PATIENCE_S) for _ in started)
        for one in started:
            one.join(PATIENCE_S)
        assert [one.exitcode for one in started] == [0] * world
    finally:
        for one in started:
            one.kill()
    return by_rank


@pytest.mark.ranks
def test_each_rank_gets_its_own_part_alone_and_all_end_alike_when_the_first_one_fails():
    by_rank = answers_of(as_a_rank, len(SIZES))
    for rank in range(len(SIZES)):
        whole, failed, odd, unpicklable, large, small = by_rank[rank]
        assert whole[0] == made_up(SIZES[rank])
        assert failed[0] == "RolloutError: too many failed"
        assert odd[0] == "RuntimeError: Interrupted: no arguments that pickle keeps"
        assert "pickle" in unpicklable[0]
        assert small[0] == made_up(9)
        assert {calls for _, calls, _ in by_rank[rank]} == {int(rank == 0)}, "the first rank alone works"
        if rank:
            # A part of 50,000 bytes, and neither the parts of the two others nor more than a few words.
            assert 50_000 < large[2] < 50_000 + 1_000
            assert small[2] < 1_000


def test_an_exception_that_pickle_cannot_restore_is_told_in_words_on_every_rank(monkeypatch):
    told: list[Any] = []
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda box: told.append([*box]))
    first = SimpleNamespace(num_processes=2, is_main_process=True)
    for error in (Interrupted(15, "in words"), RolloutError("as it is")):
        with pytest.raises(Exception, match=r"in words|as it is") as raised:
            ranks.on_main_rank(first, lambda error=error: failing(error))  # type: ignore[arg-type]
        assert told[-1] == [None, raised.value]
    assert [type(of_rank[1]) for of_rank in told] == [RuntimeError, RolloutError]
