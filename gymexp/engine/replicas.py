"""The engine's servers, asked together over HTTP."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from gymexp.errors import ServiceError
from gymexp.processes import keys
from gymexp.processes.direct import fetch_json

T = TypeVar("T")

NamedTensors = Iterator[tuple[str, torch.Tensor]]  # parameters under the names of the model's checkpoint
TensorSpecs = list[tuple[str, torch.dtype, list[int]]]  # their names, dtypes and shapes, in that order
PHASE_TIMEOUT_S = 300.0
VERSION_KEY = "weights_version"
_HEALTH_TIMEOUT_S = 10.0


class ReplicaLost(ServiceError):
    """A replica went away under a request, or was away: it refused or broke the connection, or is ill."""


class Replicas:
    """The engine's servers, asked together: vLLM, or what answers its routes (`engine/hf/replica.py`).

    on_cpu: they are vLLM without a GPU and have the worker's extension of `engine/in_vllm`. lost: those that
    `reach` found away, with the reason; they are no longer in `urls`.
    """

    def __init__(self, urls: Sequence[str], timeout_s: float = PHASE_TIMEOUT_S, on_cpu: bool = False) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self.timeout_s = timeout_s
        self.on_cpu = on_cpu
        self.lost: dict[str, str] = {}

    def only(self, urls: Sequence[str]) -> Replicas:
        """Some of them."""
        return Replicas(urls, self.timeout_s, self.on_cpu)

    def post(self, path: str, bodies: Sequence[dict[str, Any]] | dict[str, Any] | None = None) -> list[Any]:
        """POST to all at once and wait for all. bodies: one for each, or one for all. Raises ServiceError."""
        answers = self.start(path, bodies)
        wait(answers)
        return [answer.result() for answer in answers]

    def reach(self, path: str, body: dict[str, Any] | None = None) -> None:
        """POST to all, and go on without those that are lost. Raises ServiceError where one answers an error,
        or nothing in time."""
        errors = {url: answer.exception() for url, answer in self._start(path, body).items()}
        self.lost |= {url: str(error) for url, error in errors.items() if isinstance(error, ReplicaLost)}
        self.urls = [url for url in self.urls if url not in self.lost]
        for url in self.urls:
            if error := errors[url]:
                raise error

    def start(
        self, path: str, bodies: Sequence[dict[str, Any]] | dict[str, Any] | None = None
    ) -> list[Future[Any]]:
        """POST to all without waiting."""
        return list(self._start(path, bodies).values())

    def _start(
        self, path: str, bodies: Sequence[dict[str, Any]] | dict[str, Any] | None
    ) -> dict[str, Future[Any]]:
        each = bodies if isinstance(bodies, Sequence) else [bodies] * len(self.urls)
        data = {url: json.dumps(body or {}).encode() for url, body in zip(self.urls, each, strict=True)}
        return _at_once(lambda url: self._ask(url, path, data[url]), self.urls)

    def get(self, path: str) -> list[Any]:
        answers = _at_once(lambda url: self._ask(url, path, None), self.urls)
        return [answer.result() for answer in answers.values()]

    def ill(self) -> dict[str, str]:
        """Those that do not answer their health check, with the reason."""
        answers = _at_once(_health, self.urls)
        return {url: reason for url, answer in answers.items() if (reason := answer.result())}

    def wait_healthy(self, deadline_s: float, asked: threading.Event) -> None:
        """Return once all answer their health check, or once the run is asked to end. Raises ServiceError."""
        until = time.monotonic() + deadline_s
        while not asked.is_set() and (ill := self.ill()):
            if time.monotonic() > until:
                url, reason = next(iter(ill.items()))
                raise ServiceError(
                    f"the engine at {url} did not become healthy within {deadline_s:.0f} s "
                    f"(engine.start_timeout_s): {reason}"
                )
            asked.wait(0.5)

    def _ask(self, url: str, path: str, body: bytes | None) -> Any:
        phase = urllib.parse.urlsplit(path).path.strip("/")
        try:
            return fetch_json(f"{url}{path}", body, self.timeout_s, keys.header_of(keys.ENGINE))
        except urllib.error.HTTPError as error:
            said = f"{error.code}: {error.read()[:500].decode(errors='replace')}"
            kind = ReplicaLost if error.code >= 500 and _health(url) else ServiceError  # vLLM going down
            raise kind(f"weights: the engine at {url} answered {phase} with {said}") from None
        except (OSError, http.client.HTTPException) as error:
            late = isinstance(getattr(error, "reason", error), TimeoutError)
            kind = ServiceError if late else ReplicaLost
            raise kind(f"weights: the engine at {url} did not answer {phase}: {error}") from None


def write_weights(directory: Path, weights: NamedTensors, version: int) -> None:
    """A checkpoint's `model.safetensors`, which says what version it is."""
    from safetensors.torch import save_file

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt", VERSION_KEY: str(version)})


def reload_weights(replicas: Replicas, directory: Path) -> None:
    """Those that go away meanwhile are left out, as `Replicas.reach` does."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
    replicas.reach("/collective_rpc", body)
    if replicas.on_cpu:
        replicas.reach("/collective_rpc", {"method": "pack_tied_head"})


def _at_once(ask: Callable[[str], T], urls: Sequence[str]) -> dict[str, Future[T]]:
    """Each url asked in a thread of its own, which ends with its answer."""
    pool = ThreadPoolExecutor(max(1, len(urls)))
    answers = {url: pool.submit(ask, url) for url in urls}
    pool.shutdown(wait=False)
    return answers


def _health(url: str) -> str:
    try:
        fetch_json(f"{url}/health", None, _HEALTH_TIMEOUT_S, keys.header_of(keys.ENGINE))
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return ""
