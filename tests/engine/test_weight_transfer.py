"""Weights by NCCL and by CUDA IPC, with vLLM's part played here; and the watch over NCCL: whoever waits there
for a replica that has failed is told of it."""

from __future__ import annotations

import asyncio
import base64
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing.reductions
import trl.generation
from aiohttp import web
from loopback import serving

from gymexp.engine import weight_transfer
from gymexp.engine.replicas import Replicas
from gymexp.engine.weight_transfer import IpcPeer, IpcTransfer, NcclTransfer, watched
from gymexp.errors import ServiceError


def answered(value: object = None) -> Future:
    future: Future = Future()
    future.set_exception(value) if isinstance(value, Exception) else future.set_result(value)
    return future


def test_a_block_that_ends_is_left_alone():
    given_up: list[ServiceError] = []
    with watched([answered(), answered()], 0.2, "update_weights", given_up.append, grace_s=0.2):
        pass
    threading.Event().wait(0.5)
    assert given_up == []


def test_a_replica_that_fails_ends_a_block_that_waits_for_it_for_ever():
    given_up: list[ServiceError] = []
    ended = threading.Event()

    def give_up(error: ServiceError) -> None:
        given_up.append(error)
        ended.set()

    failed = answered(ServiceError("vLLM at http://a:1 answered update_weights with 500"))
    with (
        pytest.raises(ServiceError, match="answered update_weights with 500"),
        watched([Future(), failed], 30.0, "update_weights", give_up, grace_s=0.1),
    ):
        assert ended.wait(10), "in the place of NCCL's broadcast"
        failed.result()
    assert "http://a:1" in str(given_up[0])


def test_a_replica_that_says_nothing_is_waited_for_so_long_and_no_longer():
    given_up: list[ServiceError] = []
    ended = threading.Event()

    def give_up(error: ServiceError) -> None:
        given_up.append(error)
        ended.set()

    silent: Future = Future()
    with watched([silent], 0.2, "init_weight_transfer_engine", give_up, grace_s=0.1):
        assert ended.wait(10)
        silent.set_result(None)
    assert "init_weight_transfer_engine did not end within 0 s" in str(given_up[0])


def test_a_broadcast_that_hangs_after_all_have_answered_has_its_deadline_too():
    ended = threading.Event()
    with watched([answered()], 0.2, "update_weights", lambda _: ended.set(), grace_s=60.0):
        assert ended.wait(10)


def test_a_replica_that_fails_as_the_block_ends_is_raised_once_all_have_answered():
    """NCCL is done once the last tensor is sent, and the replica may fail to load it."""
    late: Future = Future()
    threading.Timer(0.3, late.set_result, [None]).start()
    with (
        pytest.raises(ServiceError, match="no room"),
        watched([late, answered(ServiceError("no room"))], 30.0, "update_weights", pytest.fail),
    ):
        pass
    assert late.done()


def test_the_watch_does_not_keep_a_process_from_ending():
    with watched([answered()], 30.0, "update_weights", pytest.fail):
        [watch] = [thread for thread in threading.enumerate() if thread.name == "watch update_weights"]
        assert watch.daemon


class Worker:
    """A vLLM of some GPUs as far as NCCL and CUDA IPC go: joins a group, and receives updates."""

    def __init__(self, world_size: int = 1) -> None:
        self.world_size = world_size
        self.asked: list[str] = []
        self.joined: dict[str, Any] = {}
        self.updates: list[dict[str, Any]] = []
        self.fails: str | None = None
        self.until: Callable[[], object] = lambda: True  # when an update has been received

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.get("/get_world_size", self.size), web.post("/{phase}", self.answer)])
        app.add_routes([web.get("/health", self.size)])
        return app

    async def size(self, request: web.Request) -> web.Response:
        return web.json_response({"world_size": self.world_size})

    async def answer(self, request: web.Request) -> web.Response:
        phase, body = request.match_info["phase"], await request.json()
        self.asked.append(phase)
        if phase == "init_weight_transfer_engine":
            self.joined = body["init_info"]
        elif phase == "update_weights":
            self.updates.append(body["update_info"])
            deadline = time.monotonic() + 10
            while not self.until() and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
        return web.json_response({}, status=500 if phase == self.fails else 200)


UPDATE = ["start_weight_update", "update_weights", "finish_weight_update"]
SPECS = [
    ("embed", torch.float32, [2, 2]),
    ("norm", torch.bfloat16, [2]),
    ("head", torch.float32, [3, 1]),
]
NAMES = {"names": ["embed", "norm", "head"], "dtype_names": ["float32", "bfloat16", "float32"]}
NAMES |= {"shapes": [[2, 2], [2], [3, 1]]}


def weights_of(version: float) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.full(shape, version, dtype=dtype)) for name, dtype, shape in SPECS]


class Vllm:
    """What TRL imports from vLLM for NCCL: the trainer joins its group once all workers are about to, and
    broadcasts once all workers receive. stateful: as of vLLM 0.28."""

    class NCCLTrainerSendWeightsArgs:
        def __init__(self, group: Any, packed: bool) -> None:
            self.group, self.packed = group, packed

    def __init__(self, stateful: bool, workers: list[Worker]) -> None:
        self._HAS_STATEFUL_TRAINER_ENGINE = stateful
        self.workers = workers
        self.joined: list[dict[str, Any]] = []
        self.groups: list[Any] = []
        self.sent: list[list[tuple[str, torch.Tensor]]] = []
        if stateful:
            self.open_trainer_endpoint = self.join
            self.packed_nccl_broadcast_producer = self.produce
        else:
            self.NCCLWeightTransferEngine = SimpleNamespace(
                trainer_init=self.join, trainer_send_weights=self.send_weights
            )
        for worker in workers:
            worker.until = lambda worker=worker: len(self.sent) == len(worker.updates)

    def join(self, info: dict[str, Any]) -> Any:
        wait_for(
            lambda: all(worker.joined.get("master_port") == info["master_port"] for worker in self.workers)
        )
        self.joined.append(info)
        self.groups.append(SimpleNamespace(group=SimpleNamespace(store="open", socket="open")))
        return self.groups[-1]

    def produce(self, iterator: Any, group: Any, src: int, post_iter_func: Callable[[Any], Any]) -> None:
        assert src == 0
        self.broadcast([(item[0], post_iter_func(item)) for item in iterator], group)

    def send_weights(self, iterator: Any, arguments: Any) -> None:
        assert arguments.packed
        self.broadcast(list(iterator), arguments.group)

    def broadcast(self, weights: list[tuple[str, torch.Tensor]], group: Any) -> None:
        assert group is self.groups[-1] and group.group.store == "open"
        wait_for(lambda: all(len(worker.updates) == len(self.sent) + 1 for worker in self.workers))
        self.sent.append(weights)


def wait_for(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "the workers were not asked meanwhile"
        time.sleep(0.01)


@pytest.fixture(params=[True, False], ids=["stateful", "older"])
def nccl(request, monkeypatch):
    """Workers of two replicas, of two GPUs and of one; NCCL as vLLM has it; what CUDA was asked."""
    workers, cuda = [Worker(2), Worker(1)], []
    vllm = Vllm(request.param, workers)
    monkeypatch.setattr(trl.generation, "vllm_client", vllm, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: cuda.append(("set_device", str(device))))
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device: cuda.append(("synchronize", str(device), len(vllm.sent)))
    )
    with serving(workers[0].app()) as one, serving(workers[1].app()) as two:
        yield SimpleNamespace(workers=workers, vllm=vllm, cuda=cuda, replicas=Replicas([one, two], 20.0))


def transfer_to(nccl: Any) -> NcclTransfer:
    def give_up(error: ServiceError) -> None:
        pytest.fail(f"nothing hung: {error}")

    return NcclTransfer(torch.device("cuda", 3), give_up, "127.0.0.1")


def test_nccl_has_one_group_of_the_trainer_and_all_workers_and_sends_every_version_over_it(nccl):
    transfer, vllm = transfer_to(nccl), nccl.vllm
    for version in (1, 2):
        transfer.send(nccl.replicas, version, SPECS, iter(weights_of(version)))
        assert not transfer.again(nccl.replicas, version), "a replica that comes back needs the trainer"
    stateful = vllm._HAS_STATEFUL_TRAINER_ENGINE
    [trainer] = vllm.joined
    assert trainer["master_address"] == "127.0.0.1" and trainer["world_size"] == 1 + 2 + 1
    assert trainer.get("packed", False) == stateful
    offsets = [worker.joined.pop("rank_offset") for worker in nccl.workers]
    assert offsets == [1, 3], "each GPU has a rank of its own, and the trainer 0"
    for worker in nccl.workers:
        assert worker.joined == {key: value for key, value in trainer.items() if key != "rank_offset"}
        assert worker.asked == ["init_weight_transfer_engine", *UPDATE, *UPDATE]
        assert worker.updates == [NAMES if stateful else NAMES | {"packed": True}] * 2
    for version, sent in enumerate(vllm.sent, start=1):
        assert [name for name, _ in sent] == NAMES["names"]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(sent, weights_of(version), strict=True))
    assert nccl.cuda == [("set_device", "cuda:3"), ("synchronize", "cuda:3", 1), ("synchronize", "cuda:3", 2)]


def test_nccl_waits_under_the_watch_and_a_replica_that_fails_there_ends_the_update(nccl, monkeypatch):
    watches: list[Any] = []

    def watching(answers: Any, *args: Any) -> Any:
        watches.append(args)
        return watched(answers, *args)

    monkeypatch.setattr(weight_transfer, "watched", watching)
    give_up = pytest.fail
    transfer = NcclTransfer(torch.device("cuda", 3), give_up)
    nccl.workers[1].fails = "update_weights"
    with pytest.raises(ServiceError, match="answered update_weights with 500"):
        transfer.send(nccl.replicas, 1, SPECS, iter(weights_of(1)))
    assert watches == [(20.0, phase, give_up) for phase in ("init_weight_transfer_engine", "update_weights")]
    assert nccl.workers[0].asked[-1] == "update_weights", "it is not told that the update is done"


def test_nccl_forms_its_group_again_after_a_restart_and_with_other_replicas(nccl):
    transfer, vllm, [first, second] = transfer_to(nccl), nccl.vllm, nccl.workers
    transfer.send(nccl.replicas, 1, SPECS, iter(weights_of(1)))
    transfer.forget()
    transfer.send(nccl.replicas, 2, SPECS, iter(weights_of(2)))
    assert len(vllm.groups) == 2 and len({info["master_port"] for info in vllm.joined}) == 2
    left, vllm.workers = nccl.replicas.only(nccl.replicas.urls[1:]), [second]
    second.updates.clear()
    vllm.sent.clear()
    transfer.send(left, 3, SPECS, iter(weights_of(3)))
    assert (len(vllm.groups), vllm.joined[-1]["world_size"], second.joined["rank_offset"]) == (3, 2, 1)
    assert len(first.asked) == 2 * 4, "it is not asked any more"
    states = [(group.group.store, group.group.socket) for group in vllm.groups]
    assert states == [(None, None), (None, None), ("open", "open")], "old groups are closed"
    transfer.close()
    assert (vllm.groups[-1].group.store, vllm.groups[-1].group.socket) == (None, None)


def test_without_replicas_the_weights_are_gathered_and_the_next_ones_get_a_new_group(nccl):
    transfer = transfer_to(nccl)
    transfer.close()  # there is no group yet
    transfer.send(nccl.replicas, 1, SPECS, iter(weights_of(1)))
    weights = iter(weights_of(2))
    transfer.send(nccl.replicas.only([]), 2, SPECS, weights)
    assert next(weights, None) is None, "all ranks gather sharded parameters together"
    assert len(nccl.vllm.sent) == 1
    transfer.send(nccl.replicas, 3, SPECS, iter(weights_of(3)))
    assert len(nccl.vllm.groups) == 2


class Ranks:
    """Two ranks of a trainer, each on a GPU of its own, in a thread each. A handle has the GPU and the values
    of its tensor; `tensors` are those that were shared, by chunk and rank."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here = threading.local()
        self.barrier = threading.Barrier(2, timeout=10)
        self.given: list[Any] = [None, None]
        self.tensors: list[weakref.ref] = []
        self.synchronized = 0
        gpu = lambda _: SimpleNamespace(uuid=f"GPU-{self.here.rank}")  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_properties", gpu)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.multiprocessing.reductions, "reduce_tensor", self.share)

    def synchronize(self) -> None:
        self.synchronized += 1

    def share(self, tensor: torch.Tensor) -> tuple[str, Any]:
        assert tensor.is_contiguous() and not tensor.requires_grad
        self.tensors.append(weakref.ref(tensor))
        return "rebuild", (f"GPU-{self.here.rank}", tensor.tolist())

    def gather(self, value: Any) -> list[Any]:
        self.given[self.here.rank] = value
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found

    def run(self, *ranks: Callable[[], None]) -> None:
        def work(number: int) -> None:
            self.here.rank = number
            try:
                ranks[number]()
            except BaseException:
                self.barrier.abort()  # the other rank would wait for this one
                raise

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(work, number) for number in range(len(ranks))]:
                done.result(30)


def test_ipc_sends_the_handles_of_every_gpu_in_chunks_that_live_until_they_are_copied(monkeypatch):
    """Chunks of 20 bytes: the first has two tensors of 16 and 4 bytes, the second the last tensor alone."""
    monkeypatch.setattr(weight_transfer, "IPC_CHUNK_BYTES", 20)
    ranks, worker = Ranks(monkeypatch), Worker()
    alive: list[int] = []

    def copied() -> bool:
        time.sleep(0.2)  # in which a rank might go on
        alive.append(sum(tensor() is not None for tensor in ranks.tensors))
        return True

    worker.until = copied
    with serving(worker.app()) as url:
        first, peer = IpcTransfer(ranks.gather, True), IpcTransfer(ranks.gather, False)
        other = IpcPeer(peer)

        def weights(rank: int) -> Iterator[tuple[str, torch.Tensor]]:
            for name, dtype, shape in SPECS:
                value = torch.full(shape, 10.0 + rank, dtype=dtype, requires_grad=True)
                yield name, value.t() if len(shape) == 2 and shape[0] == shape[1] else value

        for version in (1, 2):
            ranks.run(
                lambda version=version: first.send(Replicas([url]), version, SPECS, weights(0)),
                lambda version=version: other.update(version, SPECS, weights(1)),
            )
            assert not first.again(Replicas([url]), version)
        two_chunks = ["start_weight_update", "update_weights", "update_weights", "finish_weight_update"]
        assert worker.asked == ["init_weight_transfer_engine", *two_chunks, *two_chunks]
        assert worker.joined == {}
        first.forget()
        ranks.run(
            lambda: first.send(Replicas([url]), 3, SPECS, weights(0)),
            lambda: other.update(3, SPECS, weights(1)),
        )
        assert worker.asked[9:] == ["init_weight_transfer_engine", *two_chunks]
    assert alive == [4, 2] * 3, "the tensors of one chunk, on both ranks"
    assert ranks.synchronized == 2 * 2 * 3, "each rank, before it shares a chunk"
    of_version = [[info[key] for info in worker.updates[:2]] for key in ("names", "dtype_names", "shapes")]
    assert of_version == [[NAMES[key][:2], NAMES[key][2:]] for key in ("names", "dtype_names", "shapes")]
    for info in worker.updates:
        handles = pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))
        assert handles == [
            {f"GPU-{rank}": (f"GPU-{rank}", torch.full(shape, 10.0 + rank).tolist()) for rank in (0, 1)}
            for shape in info["shapes"]
        ]
