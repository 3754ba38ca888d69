"""HTTP requests to all of the engine's replicas at once."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from gymexp.errors import ServiceError
from gymexp.processes import access_keys
from gymexp.processes.http_client import fetch, fetch_json

T = TypeVar("T")

NamedTensors = Iterator[tuple[str, torch.Tensor]]  # parameters, named as in the model's checkpoint
TensorSpecs = list[tuple[str, torch.dtype, list[int]]]  # name, dtype and shape of each, in the same order
PHASE_TIMEOUT_S = 300.0
VERSION_KEY = "weights_version"
_HEALTH_TIMEOUT_S = 10.0


class ReplicaLost(ServiceError):
    """A replica is unreachable: it refused or broke off the connection, or answered 5xx and fails its health
    check.
    """


class ReplicaRefused(ServiceError):
    """A replica answered a request with an error. status: of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Replicas:
    """The engine's replicas, each a vLLM or a server with the same routes (`engine/hf/replica.py`).

    on_cpu: whether they are vLLM on a CPU, with the worker extension of `engine/in_vllm`. lost: the replicas
    that `reach` found unreachable, with the reason; they are no longer in `urls`.
    """

    def __init__(self, urls: Sequence[str], timeout_s: float = PHASE_TIMEOUT_S, on_cpu: bool = False) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self.timeout_s = timeout_s
        self.on_cpu = on_cpu
        self.lost: dict[str, str] = {}

    def only(self, urls: Sequence[str]) -> Replicas:
        """Returns the replicas at `urls` alone, with the same options."""
        return Replicas(urls, self.timeout_s, self.on_cpu)

    def post(self, path: str, bodies: Sequence[dict[str, Any]] | dict[str, Any] | None = None) -> list[Any]:
        """POSTs to all replicas at once and returns their JSON answers. bodies: one for each, or one for all.

        Raises the ServiceError of a replica that fails, once all have answered.
        """
        answers = self.start(path, bodies)
        wait(answers)
        return [answer.result() for answer in answers]

    def reach(self, path: str, body: dict[str, Any] | None = None, allowed: Collection[int] = ()) -> None:
        """POSTs to all replicas, and moves those that are unreachable from `urls` to `lost`.

        Raises ServiceError if a replica answers with an error whose status is not in `allowed`, or does not
        answer within timeout_s.
        """
        errors = {url: answer.exception() for url, answer in self._start(path, body, _nothing).items()}
        self.lost |= {url: str(error) for url, error in errors.items() if isinstance(error, ReplicaLost)}
        self.urls = [url for url in self.urls if url not in self.lost]
        for url in self.urls:
            error = errors[url]
            if error and not (isinstance(error, ReplicaRefused) and error.status in allowed):
                raise error

    def start(
        self, path: str, bodies: Sequence[dict[str, Any]] | dict[str, Any] | None = None
    ) -> list[Future[Any]]:
        """POSTs to all replicas without waiting. Returns a future of each answer, in the order of `urls`."""
        return list(self._start(path, bodies).values())

    def _start(
        self,
        path: str,
        bodies: Sequence[dict[str, Any]] | dict[str, Any] | None,
        parse: Callable[[bytes], Any] | None = None,
    ) -> dict[str, Future[Any]]:
        """parse: makes the future's result of an answer; None: the answer is JSON."""
        body_of_each = bodies if isinstance(bodies, Sequence) else [bodies] * len(self.urls)
        pairs = zip(self.urls, body_of_each, strict=True)
        data = {url: json.dumps(body or {}).encode() for url, body in pairs}
        parse = parse or _parsed
        return _call_for_each(lambda url: parse(self._request(url, path, data[url])), self.urls)

    def get(self, path: str) -> list[Any]:
        """Returns the JSON answers of all replicas to a GET, in the order of `urls`. Raises ServiceError."""
        answers = _call_for_each(lambda url: _parsed(self._request(url, path, None)), self.urls)
        return [answer.result() for answer in answers.values()]

    def ill(self) -> dict[str, str]:
        """Returns {url: reason} of the replicas that fail their health check."""
        answers = _call_for_each(_check_health, self.urls)
        return {url: reason for url, answer in answers.items() if (reason := answer.result())}

    def wait_healthy(self, deadline_s: float, end_requested: threading.Event) -> None:
        """Returns once all replicas pass their health check, or once `end_requested` is set because the run
        must end. Raises ServiceError if a replica is not healthy within deadline_s.
        """
        deadline = time.monotonic() + deadline_s
        while not end_requested.is_set() and (ill := self.ill()):
            if time.monotonic() > deadline:
                url, reason = next(iter(ill.items()))
                raise ServiceError(
                    f"the engine at {url} did not become healthy within {deadline_s:.0f} s "
                    f"(engine.start_timeout_s): {reason}"
                )
            end_requested.wait(0.5)

    def _request(self, url: str, path: str, body: bytes | None) -> bytes:
        """Returns a replica's answer to a GET, or with a body to a POST. vLLM's answers to the requests about
        adapters are no JSON.

        Raises ReplicaLost if the replica is unreachable, ReplicaRefused if it answers with an error, and
        ServiceError if it answers late.
        """
        phase = urllib.parse.urlsplit(path).path.strip("/")
        try:
            return fetch(f"{url}{path}", body, self.timeout_s, access_keys.header_of(access_keys.ENGINE))
        except urllib.error.HTTPError as error:
            answer = f"{error.code}: {error.read()[:500].decode(errors='replace')}"
            message = f"weights: the engine at {url} answered {phase} with {answer}"
            # vLLM answers 500 while it shuts down; then its health check fails too.
            if error.code >= 500 and _check_health(url):
                raise ReplicaLost(message) from None
            raise ReplicaRefused(message, error.code) from None
        except (OSError, http.client.HTTPException) as error:
            is_late = isinstance(getattr(error, "reason", error), TimeoutError)
            error_type = ServiceError if is_late else ReplicaLost
            raise error_type(f"weights: the engine at {url} did not answer {phase}: {error}") from None


def write_weights(directory: Path, weights: NamedTensors, version: int) -> None:
    """Writes the weights as `model.safetensors` into `directory`, replacing what it has. The file's metadata
    has the version.
    """
    from safetensors.torch import save_file

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt", VERSION_KEY: str(version)})


def reload_weights(replicas: Replicas, directory: Path) -> None:
    """Makes the replicas load the `model.safetensors` in `directory`.

    Replicas that are unreachable move from `replicas.urls` to `replicas.lost`. Raises ServiceError if a
    replica answers with an error, or too late.
    """
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
    replicas.reach("/collective_rpc", body)
    if replicas.on_cpu:
        replicas.reach("/collective_rpc", {"method": "pack_tied_head"})


def _parsed(answer: bytes) -> Any:
    return json.loads(answer) if answer.strip() else None


def _nothing(_: bytes) -> None:
    pass


def _call_for_each(function: Callable[[str], T], urls: Sequence[str]) -> dict[str, Future[T]]:
    """Calls the function for each url in its own thread, which ends with the call. Returns the futures."""
    pool = ThreadPoolExecutor(max(1, len(urls)))
    answers = {url: pool.submit(function, url) for url in urls}
    pool.shutdown(wait=False)
    return answers


def _check_health(url: str) -> str:
    """Returns "" if the replica passes its health check, else the reason."""
    try:
        fetch_json(f"{url}/health", None, _HEALTH_TIMEOUT_S, access_keys.header_of(access_keys.ENGINE))
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return ""
