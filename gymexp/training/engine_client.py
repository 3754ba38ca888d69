"""The engine as the trainer uses it: it samples within a `with` block, with a known version of weights."""

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
from gymexp.processes import access_keys, ports
from gymexp.record.directory import RunDirectory
from gymexp.record.services_file import Services

if TYPE_CHECKING:
    import torch

    from gymexp.engine.engine_load import EngineLoad
    from gymexp.engine.hf.engine import HFEngine
    from gymexp.engine.replicas import NamedTensors
    from gymexp.engine.weight_sync import WeightSync
    from gymexp.engine.weight_transfer import IpcPeer


class Engine(Protocol):
    """The sampling engine of the trainer, which runs in the trainer's process or in servers."""

    def sampling(self, version: int) -> AbstractContextManager[None]:
        """Lets the engine sample within the block. version: of its weights, in optimizer steps done."""
        ...

    def tend(self) -> None:
        """Maintains the engine; the collector calls this about once a second within the block."""
        ...


class HFSampling:
    """The hf engine in the trainer's process. It samples from the model that the trainer updates, so it
    pauses outside the block."""

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
    """Servers that sample on request: vLLM, or the hf engine in processes of its own."""

    def __init__(
        self,
        sync: WeightSync | IpcPeer | None,
        shared: bool,
        first_version: int | None = 0,
        load: EngineLoad | None = None,
    ) -> None:
        """sync: WeightSync on the first rank; on the others IpcPeer with CUDA IPC, else None. shared: whether
        the servers share their GPUs with the trainer, and so sleep outside the block. first_version: of the
        weights that they begin with, in optimizer steps done; None if they need weights before they sample.
        load: given on the first rank.
        """
        self.sync = sync
        self._load = load
        self.shared = shared
        self.first_version = first_version
        # The policy's current weights, or None if this rank alone cannot have them; set by the trainer.
        self.named_weights: Callable[[], NamedTensors | None] | None = None

    @contextmanager
    def sampling(self, version: int) -> Iterator[None]:
        yield
        if self.shared:
            self._first_rank().sleep()

    def tend(self) -> None:
        assert self.named_weights is not None
        self._first_rank().tend(self.named_weights)

    def load_since_last(self) -> dict[str, float]:
        """Returns `EngineLoad.since_last` on the first rank, and nothing on the others."""
        return self._load.since_last() if self._load else {}

    def _first_rank(self) -> WeightSync:
        from gymexp.engine.weight_sync import WeightSync

        assert isinstance(self.sync, WeightSync), "the first rank alone plays"
        return self.sync


def serve_hf(config: RunConfig, model: Any, tokenizer: Any, fd: int, stack: ExitStack) -> HFSampling:
    """Starts the hf engine, which samples from `model` itself, on the controller's socket `fd`. `stack`
    closes the engine and its server."""
    import torch

    from gymexp.engine.hf.engine import HFEngine
    from gymexp.engine.hf.server import serve
    from gymexp.policy.hub_snapshot import directory_of
    from gymexp.policy.model import end_token_ids

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
    stack.callback(serve(engine, sock=ports.adopt(fd), key=access_keys.required(access_keys.ENGINE)).close)
    return sampling


def join_servers(
    config: RunConfig,
    run: RunDirectory,
    services: Services,
    rank: int,
    device: torch.device,
    stop_requested: threading.Event,
    stack: ExitStack,
) -> ServerSampling:
    """Waits until the replicas are healthy or a stop is requested, then opens the transfer that sends them
    the weights. `stack` closes it. Ranks other than the first only take part in a transfer by CUDA IPC.

    Raises ServiceError if a replica is not healthy after engine.start_timeout_s.
    """
    from gymexp.engine.adapter_transfer import AdapterTransfer
    from gymexp.engine.admission import Admission
    from gymexp.engine.engine_load import EngineLoad
    from gymexp.engine.replicas import PHASE_TIMEOUT_S, Replicas
    from gymexp.engine.weight_sync import WeightSync
    from gymexp.engine.weight_transfer import DiskTransfer, IpcPeer, IpcTransfer, NcclTransfer

    def give_up(error: ServiceError) -> None:
        """Ends the process with `error` as its result, because NCCL waits for a failed replica for ever, in a
        call that nothing else can interrupt."""
        replace_file(run.path / "result.json", json.dumps({"error": printable(str(error))}))
        os._exit(1)

    def gather(value: Any) -> list[Any]:
        from accelerate.utils import gather_object

        return gather_object([value])

    kind = services.transfer
    # Servers that gymexp did not start may have any weights, and others begin without the adapter.
    first_version = None if config.engine.urls or kind == "adapter" else 0
    if rank > 0:
        peer = IpcPeer(IpcTransfer(gather, is_first_rank=False)) if kind == "ipc" else None
        return ServerSampling(peer, services.shared, first_version)
    match kind:
        case "ipc":
            transfer = IpcTransfer(gather, is_first_rank=True)
        case "nccl":
            transfer = NcclTransfer(device, give_up, services.trainer_address)
        case "adapter":
            transfer = AdapterTransfer(run.path / "weights", config.model.lora)
        case _:
            transfer = DiskTransfer(run.path / "weights")
    # If this process sees no GPU, a vLLM that gymexp started sees none either.
    own_vllm = services.engine == "vllm" and not config.engine.urls
    replicas = Replicas(services.engine_urls, on_cpu=own_vllm and device.type == "cpu")
    replicas.wait_healthy(config.engine.start_timeout_s, stop_requested)
    directory = run.path / "weights-again"  # for the weights of a replica that is back
    admission = Admission(services.gateway_urls, access_keys.required(access_keys.RUN), PHASE_TIMEOUT_S)
    sync = WeightSync(
        replicas,
        transfer,
        admission,
        directory,
        services.shared,
        first_version,
        cuts=config.overlap.update == "abort",
        end_requested=stop_requested,
    )
    stack.callback(sync.close)
    return ServerSampling(sync, services.shared, first_version, EngineLoad(admission))
