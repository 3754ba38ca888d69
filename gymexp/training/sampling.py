"""The engine as the trainer's process sees it: it samples within a block, from weights of a known version."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from gymexp.config.schema import RunConfig
from gymexp.errors import ServiceError
from gymexp.files import replace_file
from gymexp.printable import printable
from gymexp.processes import keys, ports
from gymexp.record.directory import RunDirectory
from gymexp.record.services import Services

if TYPE_CHECKING:
    import torch

    from gymexp.engine.hf.engine import HFEngine
    from gymexp.engine.replicas import NamedTensors
    from gymexp.engine.transfer import IpcPeer
    from gymexp.engine.weights import WeightSync


class Engine(Protocol):
    """What samples for the trainer, in its own process or in servers."""

    def sampling(self, version: int) -> AbstractContextManager[None]:
        """Within the block it samples. version: of its weights, in optimizer steps done."""
        ...

    def tend(self) -> None:
        """Called now and then within the block."""
        ...


class HFSampling:
    """The hf engine, in this process; it rests while the trainer works on the model that it samples from."""

    def __init__(self, engine: HFEngine) -> None:
        self._engine = engine
        engine.pause()

    @contextmanager
    def sampling(self, version: int) -> Iterator[None]:
        self._engine.weights_version = version
        self._engine.resume()
        try:
            yield
        finally:
            self._engine.pause()

    def tend(self) -> None:
        pass


class ServerSampling:
    """Servers that sample whenever they are asked: vLLM, or the hf engine on a node of its own.

    sync: on the first rank and, with CUDA IPC, on the others.
    """

    def __init__(self, sync: WeightSync | IpcPeer | None, shared: bool) -> None:
        self.sync = sync
        self.shared = shared
        self.named_weights: Callable[[], NamedTensors] | None = None  # the trainer's, once there is one

    @contextmanager
    def sampling(self, version: int) -> Iterator[None]:
        yield
        if self.shared:
            self._first_rank().sleep()

    def tend(self) -> None:
        assert self.named_weights is not None
        self._first_rank().tend(self.named_weights)

    def _first_rank(self) -> WeightSync:
        from gymexp.engine.weights import WeightSync

        assert isinstance(self.sync, WeightSync), "the first rank alone plays"
        return self.sync


def serve_hf(config: RunConfig, model: Any, tokenizer: Any, fd: int, stack: ExitStack) -> HFSampling:
    """The hf engine on the socket that the controller handed down; samples from `model` itself."""
    import torch

    from gymexp.engine.hf.engine import HFEngine
    from gymexp.engine.hf.server import serve
    from gymexp.policy.model import end_token_ids
    from gymexp.policy.snapshot import directory_of

    engine = HFEngine(
        model,
        eos_token_ids=end_token_ids(tokenizer, directory_of(config.model)),
        pad_token_id=tokenizer.pad_token_id,
        max_batch_size=config.engine.max_batch_size,
        max_model_len=config.model.max_model_len,
        tokenizer=tokenizer,
        dtype=getattr(torch, config.model.dtype),
    )
    sampling = HFSampling(engine)
    stack.callback(engine.close)
    stack.callback(serve(engine, sock=ports.adopt(fd), key=keys.required(keys.ENGINE)).close)
    return sampling


def join_servers(
    config: RunConfig,
    run: RunDirectory,
    services: Services,
    rank: int,
    device: torch.device,
    asked: threading.Event,
    stack: ExitStack,
) -> ServerSampling:
    """Wait for the replicas and make the weights' way to them. The first rank's work, but for CUDA IPC."""
    from gymexp.engine.admission import Admission
    from gymexp.engine.replicas import PHASE_TIMEOUT_S, Replicas
    from gymexp.engine.transfer import DiskTransfer, IpcPeer, IpcTransfer, NcclTransfer
    from gymexp.engine.weights import WeightSync

    def give_up(error: ServiceError) -> None:
        """NCCL waits for a replica that has failed, in a call that nothing else ends."""
        replace_file(run.path / "result.json", json.dumps({"error": printable(str(error))}))
        os._exit(1)

    def gather(value: Any) -> list[Any]:
        from accelerate.utils import gather_object

        return gather_object([value])

    kind = services.transfer
    transfer = IpcTransfer(gather, rank == 0) if kind == "ipc" else None
    if rank > 0:
        return ServerSampling(transfer and IpcPeer(transfer), services.shared)
    if transfer is None:
        transfer = (
            NcclTransfer(device, give_up, services.trainer_address)
            if kind == "nccl"
            else DiskTransfer(run.path / "weights")
        )
    # Where this process sees no GPU, the vLLM that gymexp starts sees none either.
    started = services.engine == "vllm" and not config.engine.urls
    replicas = Replicas(services.engine_urls, on_cpu=started and device.type == "cpu")
    replicas.wait_healthy(config.engine.start_timeout_s, asked)
    first_version = None if config.engine.urls else 0  # servers that gymexp did not start hold any weights
    again = run.path / "weights-again"
    admission = Admission(services.gateway_url, keys.required(keys.RUN), PHASE_TIMEOUT_S)
    sync = WeightSync(replicas, transfer, admission, again, services.shared, first_version)
    stack.callback(sync.close)
    return ServerSampling(sync, services.shared)
