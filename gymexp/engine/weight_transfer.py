"""Three ways to send all weights from the trainer to the engine's replicas. `adapter_transfer` is a fourth,
which sends an adapter alone.

nccl   One NCCL group has the trainer (rank 0) and all workers of all replicas (vLLM's weight-transfer API).
       For GPUs that either sample or train.
ipc    The trainer sends handles to its GPU memory, and the replica on the same GPU copies from it. For GPUs
       that do both.
disk   Every replica reads a safetensors file. For vLLM on a CPU, and the hf engine on nodes of its own.
"""

from __future__ import annotations

import base64
import contextlib
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from gymexp.engine.replicas import (
    NamedTensors,
    Replicas,
    TensorSpecs,
    reload_weights,
    write_weights,
)
from gymexp.errors import ServiceError

IPC_CHUNK_BYTES = 1 << 30


class DiskTransfer:
    """Writes into two directories in turn, so that a replica never reads a file that is being written."""

    sends_all = True

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def send(self, replicas: Replicas, version: int, specs: TensorSpecs, weights: NamedTensors) -> None:
        target = self._directory / f"{version % 2}"
        write_weights(target, weights, version)
        reload_weights(replicas, target)

    def again(self, replicas: Replicas, version: int) -> bool:
        reload_weights(replicas, self._directory / f"{version % 2}")
        return True

    def forget(self) -> None:
        pass

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


class NcclTransfer:
    """Packs the tensors and broadcasts them once for all replicas.

    give_up: called from another thread when a replica fails while NCCL waits for it, as nothing else would
    end that wait. address: this node's address, at which the members of the group meet.
    """

    sends_all = True

    def __init__(
        self, device: torch.device, give_up: Callable[[ServiceError], None], address: str = "127.0.0.1"
    ) -> None:
        from trl.generation import vllm_client

        self._vllm: Any = vllm_client  # it imports from vLLM, by version, what this class needs too
        self._device = device
        self._give_up = give_up
        self._address = address
        self._group: Any = None
        self._members: list[str] = []

    def send(self, replicas: Replicas, version: int, specs: TensorSpecs, weights: NamedTensors) -> None:
        if not replicas.urls:
            self._members = []
            for _ in weights:  # all ranks must gather sharded parameters together
                pass
            return
        if self._members != replicas.urls:
            self._join(replicas)
        names, dtypes, shapes = (list(column) for column in zip(*specs, strict=True))
        info = {"names": names, "shapes": shapes}
        info["dtype_names"] = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        stateful = self._vllm._HAS_STATEFUL_TRAINER_ENGINE
        replicas.post("/start_weight_update")
        receiving = replicas.start(
            "/update_weights", {"update_info": info | ({} if stateful else {"packed": True})}
        )
        with watched(receiving, replicas.timeout_s, "update_weights", self._give_up):
            if stateful:
                self._vllm.packed_nccl_broadcast_producer(
                    iterator=weights, group=self._group, src=0, post_iter_func=lambda item: item[1]
                )
            else:
                arguments = self._vllm.NCCLTrainerSendWeightsArgs(group=self._group, packed=True)
                self._vllm.NCCLWeightTransferEngine.trainer_send_weights(weights, arguments)
            torch.cuda.synchronize(self._device)
        replicas.post("/finish_weight_update")

    def again(self, replicas: Replicas, version: int) -> bool:
        return False

    def forget(self) -> None:
        self._members = []

    def close(self) -> None:
        with contextlib.suppress(AttributeError):  # its destructor would fail on this store and this socket
            self._group.group.store = None
            self._group.group.socket = None

    def _join(self, replicas: Replicas) -> None:
        """Forms the NCCL group of this process and all workers of the replicas."""
        self.close()
        torch.cuda.set_device(self._device)
        sizes = [answer["world_size"] for answer in replicas.get("/get_world_size")]
        with socket.socket() as free:
            free.bind((self._address, 0))
            port = free.getsockname()[1]
        common = {"master_address": self._address, "master_port": port, "world_size": 1 + sum(sizes)}
        stateful = self._vllm._HAS_STATEFUL_TRAINER_ENGINE
        if stateful:
            common["packed"] = True
        infos = [{"init_info": common | {"rank_offset": 1 + sum(sizes[:i])}} for i in range(len(sizes))]
        joining = replicas.start("/init_weight_transfer_engine", infos)
        open_group = (
            self._vllm.open_trainer_endpoint if stateful else self._vllm.NCCLWeightTransferEngine.trainer_init
        )
        with watched(joining, replicas.timeout_s, "init_weight_transfer_engine", self._give_up):
            self._group = open_group(infos[0]["init_info"])
        self._members = list(replicas.urls)


@contextlib.contextmanager
def watched(
    answers: list[Future[Any]],
    timeout_s: float,
    phase: str,
    give_up: Callable[[ServiceError], None],
    grace_s: float = 10.0,
) -> Iterator[None]:
    """Watches a block that waits for the replicas in NCCL, which never stops waiting for a rank that failed.

    answers: the replicas' answers to the request that started the transfer; at its end the block waits for
    all of them, and raises their errors. give_up: called from another thread if the block has not ended by
    itself: grace_s after an answer was an error or was missing for timeout_s, or timeout_s after all answers
    came.
    """
    block_ended = threading.Event()

    def watch() -> None:
        done, waiting = wait(answers, timeout_s, FIRST_EXCEPTION)
        failed = next((error for answer in done if (error := answer.exception())), None)
        if block_ended.wait(grace_s if failed or waiting else timeout_s):
            return
        late = ServiceError(f"weights: {phase} did not end within {timeout_s:.0f} s")
        give_up(failed if isinstance(failed, ServiceError) else late)

    threading.Thread(target=watch, name=f"watch {phase}", daemon=True).start()
    try:
        yield
        for answer in answers:
            answer.result()
    finally:
        block_ended.set()


class IpcTransfer:
    """Every rank of the trainer shares the weights in its GPU's memory, and rank 0 sends the handles to the
    replicas.

    gather: takes a rank's value and returns those of all ranks, on each rank. Weights are sent in chunks. The
    tensors of a chunk are kept until the replicas have copied them, and no longer, so that gathered or merged
    parameters take the memory of one chunk.
    """

    sends_all = True

    def __init__(self, gather: Callable[[Any], list[Any]], is_first_rank: bool) -> None:
        self._gather = gather
        self._is_first_rank = is_first_rank
        self._joined = False

    def send(self, replicas: Replicas, version: int, specs: TensorSpecs, weights: NamedTensors) -> None:
        if self._is_first_rank:
            if not self._joined:
                replicas.post("/init_weight_transfer_engine", {"init_info": {}})
                self._joined = True
            replicas.post("/start_weight_update")
        chunk: list[torch.Tensor] = []
        begin = 0
        for index, (_, tensor) in enumerate(weights):
            chunk.append(tensor.detach().contiguous())
            size = sum(part.nbytes for part in chunk)
            if index == len(specs) - 1 or size >= IPC_CHUNK_BYTES:
                self._send_chunk(replicas, specs[begin : index + 1], chunk)
                chunk, begin = [], index + 1
        if self._is_first_rank:
            replicas.post("/finish_weight_update")

    def again(self, replicas: Replicas, version: int) -> bool:
        return False

    def forget(self) -> None:
        self._joined = False

    def close(self) -> None:
        pass

    def _send_chunk(self, replicas: Replicas, specs: TensorSpecs, tensors: list[torch.Tensor]) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.synchronize()
        gpu = str(torch.cuda.get_device_properties(tensors[0].device).uuid)
        shared = [{gpu: reduce_tensor(tensor)[1]} for tensor in tensors]
        handles_of_ranks = self._gather(shared)
        if self._is_first_rank:
            merged = [
                {gpu: handle for handles in of_tensor for gpu, handle in handles.items()}
                for of_tensor in zip(*handles_of_ranks, strict=True)
            ]
            names, dtypes, shapes = (list(column) for column in zip(*specs, strict=True))
            info: dict[str, Any] = {"names": names, "shapes": shapes}
            info["dtype_names"] = [str(dtype).removeprefix("torch.") for dtype in dtypes]
            info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(merged)).decode()
            replicas.post("/update_weights", {"update_info": info})
        # A barrier: every rank keeps its tensors until all replicas have copied them.
        self._gather(None)


class IpcPeer:
    """Sends the weights of a rank other than the first, on which `WeightSync` does so."""

    def __init__(self, transfer: IpcTransfer) -> None:
        self._transfer = transfer

    def update(self, version: int, specs: TensorSpecs, weights: NamedTensors) -> None:
        self._transfer.send(Replicas([]), version, specs, weights)


class Transfer(Protocol):
    """A way to send weights from the trainer to the replicas. sends_all: whether it sends all weights of the
    policy; else the replicas must keep the others while they sleep."""

    sends_all: bool

    def send(self, replicas: Replicas, version: int, specs: TensorSpecs, weights: NamedTensors) -> None:
        """Sends the weights to the replicas. specs: name, dtype and shape of each, in the order of `weights`.

        Raises ServiceError if a replica fails.
        """

    def again(self, replicas: Replicas, version: int) -> bool:
        """Sends what the last `send` sent to replicas that came back, without the trainer's weights. Returns
        False if the transfer has not kept it. version: that of the last `send`.

        Replicas that are unreachable move from `replicas.urls` to `replicas.lost`. Raises ServiceError if a
        replica answers with an error, or too late.
        """
        ...

    def forget(self) -> None:
        """Makes the next `send` form the group of trainer and replicas again, as a replica was restarted."""

    def close(self) -> None: ...
