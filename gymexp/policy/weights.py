"""The trainer's weights brought to every vLLM replica, in the trainer's process.

For each new version: requests are paused and kept, the weights sent, the prefix cache dropped, requests
resumed. `nccl` puts all replicas and their tensor-parallel ranks into one NCCL group with the trainer as rank
0 (vLLM's weight-transfer API). `disk` writes a safetensors file that every replica reads: for places without
NCCL, a shared GPU, and vLLM on a CPU. Every request to a replica has a deadline; what fails names the replica
and the phase.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from gymexp.errors import ServiceError

log = logging.getLogger(__name__)

NamedTensors = Iterator[tuple[str, torch.Tensor]]  # parameters under the names of the model's checkpoint
TensorSpecs = list[tuple[str, torch.dtype, list[int]]]  # their names, dtypes and shapes, in that order
PHASE_TIMEOUT_S = 300.0


class Transfer(Protocol):
    """A way of the weights."""

    def send(self, replicas: Replicas, version: int, specs: TensorSpecs, weights: NamedTensors) -> None: ...

    def close(self) -> None: ...


class Replicas:
    """The vLLM servers, asked together."""

    def __init__(self, urls: Sequence[str], timeout_s: float = PHASE_TIMEOUT_S) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(max(1, len(self.urls)), thread_name_prefix="replicas")

    def post(self, path: str, bodies: Sequence[dict[str, Any]] | dict[str, Any] | None = None) -> list[Any]:
        """POST to all at once and wait for all. `bodies`: one for each, or one for all."""
        return [future.result() for future in self.start(path, bodies)]

    def start(self, path: str, bodies: Sequence[dict[str, Any]] | dict[str, Any] | None = None):
        """The same without waiting: their futures."""
        each = bodies if isinstance(bodies, Sequence) else [bodies] * len(self.urls)
        return [
            self._pool.submit(self._ask, url, path, json.dumps(body or {}).encode())
            for url, body in zip(self.urls, each, strict=True)
        ]

    def get(self, path: str) -> list[Any]:
        return list(self._pool.map(lambda url: self._ask(url, path, None), self.urls))

    def wait_healthy(self, deadline_s: float, asked: threading.Event) -> None:
        """Return once all answer their health check, or once the run is asked to end. Raises ServiceError."""
        until = time.monotonic() + deadline_s
        for url in self.urls:
            while not asked.is_set():
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=10).close()
                    break
                except OSError as error:
                    if time.monotonic() > until:
                        raise ServiceError(
                            f"vLLM at {url} did not become healthy within {deadline_s:.0f} s "
                            f"(engine.start_timeout_s): {error}"
                        ) from None
                asked.wait(0.5)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, url: str, path: str, body: bytes | None) -> Any:
        request = urllib.request.Request(f"{url}{path}", body, {"Content-Type": "application/json"})
        phase = urllib.parse.urlsplit(path).path.strip("/")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            said = error.read()[:500].decode(errors="replace")
            raise ServiceError(f"weights: vLLM at {url} answered {phase} with {error.code}: {said}") from None
        except (OSError, TimeoutError) as error:
            raise ServiceError(f"weights: vLLM at {url} did not answer {phase}: {error}") from None
        return json.loads(text) if text.strip() else None


class WeightSync:
    """`update` makes the replicas sample with the weights of a version (optimizer steps done)."""

    def __init__(self, replicas: Replicas, transfer: Transfer) -> None:
        self._replicas = replicas
        self._transfer = transfer

    def update(self, version: int, specs: TensorSpecs, weights: NamedTensors) -> None:
        """Raises ServiceError with replica and phase. Requests wait meanwhile and are not lost."""
        began = time.monotonic()
        self._replicas.post("/pause?mode=keep")
        try:
            self._transfer.send(self._replicas, version, specs, weights)
            self._replicas.post("/reset_prefix_cache")
        finally:
            self._replicas.post("/resume")
        log.info("weights of step %d sent in %.2f s", version, time.monotonic() - began)

    def close(self) -> None:
        self._transfer.close()
        self._replicas.close()


class DiskTransfer:
    """Two directories used in turn, so that a replica never reads what is being written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def send(self, replicas: Replicas, version: int, specs: TensorSpecs, weights: NamedTensors) -> None:
        from safetensors.torch import save_file

        target = self._directory / f"{version % 2}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(target)}}
        replicas.post("/collective_rpc", body)

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


class NcclTransfer:
    """One group of the trainer and all workers of all replicas; tensors are packed and broadcast."""

    def __init__(self, replicas: Replicas, device: torch.device) -> None:
        from trl.generation import vllm_client

        self._vllm: Any = vllm_client  # what it imports of vLLM, by version, is what is needed here too
        torch.cuda.set_device(device)
        sizes = [answer["world_size"] for answer in replicas.get("/get_world_size")]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"master_address": "127.0.0.1", "master_port": port, "world_size": 1 + sum(sizes)}
        if self._vllm._HAS_STATEFUL_TRAINER_ENGINE:
            common["packed"] = True
        infos = [{"init_info": common | {"rank_offset": 1 + sum(sizes[:i])}} for i in range(len(sizes))]
        joining = replicas.start("/init_weight_transfer_engine", infos)
        info = infos[0]["init_info"]
        if self._vllm._HAS_STATEFUL_TRAINER_ENGINE:
            self._group = self._vllm.open_trainer_endpoint(info)
        else:
            self._group = self._vllm.NCCLWeightTransferEngine.trainer_init(info)
        for one in joining:
            one.result()

    def send(self, replicas: Replicas, version: int, specs: TensorSpecs, weights: NamedTensors) -> None:
        names, dtypes, shapes = (list(column) for column in zip(*specs, strict=True))
        info = {"names": names, "shapes": shapes}
        info["dtype_names"] = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        stateful = self._vllm._HAS_STATEFUL_TRAINER_ENGINE
        replicas.post("/start_weight_update")
        receiving = replicas.start(
            "/update_weights", {"update_info": info | ({} if stateful else {"packed": True})}
        )
        if stateful:
            self._vllm.packed_nccl_broadcast_producer(
                iterator=weights, group=self._group, src=0, post_iter_func=lambda item: item[1]
            )
        else:
            arguments = self._vllm.NCCLTrainerSendWeightsArgs(group=self._group, packed=True)
            self._vllm.NCCLWeightTransferEngine.trainer_send_weights(weights, arguments)
        for one in receiving:
            one.result()
        replicas.post("/finish_weight_update")

    def close(self) -> None:
        with contextlib.suppress(AttributeError):
            self._group.group.store = None
            self._group.group.socket = None
