"""The trainer's weights brought to every replica of the engine, in the trainer's process.

For each new version: requests are paused and kept, the weights sent (`gymexp.policy.transfer`), the prefix
cache dropped, requests resumed. A replica that went away, and is back, holds the weights it began with: the
gateway keeps requests from it until `tend` has sent it the policy's own. Every request to a replica has a
deadline; what fails names the replica and the phase. A replica that goes away during an update is left out of
the rest of it, except where the others wait for it in NCCL, or copy from the trainer's memory.
"""

from __future__ import annotations

import http.client
import json
import logging
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from gymexp.errors import ServiceError
from gymexp.run import keys
from gymexp.run.direct import open_url

log = logging.getLogger(__name__)
T = TypeVar("T")

NamedTensors = Iterator[tuple[str, torch.Tensor]]  # parameters under the names of the model's checkpoint
TensorSpecs = list[tuple[str, torch.dtype, list[int]]]  # their names, dtypes and shapes, in that order
PHASE_TIMEOUT_S = 300.0
VERSION_KEY = "weights_version"
_HEALTH_TIMEOUT_S = 10.0


class ReplicaLost(ServiceError):
    """A replica went away under a request, or was away: it refused or broke the connection, or is ill."""


class Replicas:
    """The engine's servers, asked together: vLLM, or what answers its routes (`policy/hf_replica.py`).

    on_cpu: they are vLLM without a GPU and have the worker's extension of `policy/in_vllm`. lost: those that
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
            return _request(f"{url}{path}", body, self.timeout_s, keys.ENGINE)
        except urllib.error.HTTPError as error:
            said = f"{error.code}: {error.read()[:500].decode(errors='replace')}"
            kind = ReplicaLost if error.code >= 500 and _health(url) else ServiceError  # vLLM going down
            raise kind(f"weights: the engine at {url} answered {phase} with {said}") from None
        except (OSError, http.client.HTTPException) as error:
            late = isinstance(getattr(error, "reason", error), TimeoutError)
            kind = ServiceError if late else ReplicaLost
            raise kind(f"weights: the engine at {url} did not answer {phase}: {error}") from None


class Transfer(Protocol):
    """A way of the weights (`gymexp.policy.transfer`)."""

    def send(self, replicas: Replicas, version: int, specs: TensorSpecs, weights: NamedTensors) -> None: ...

    def forget(self) -> None:
        """A replica was started anew: what was agreed on with the others has to be so again."""

    def close(self) -> None: ...


class WeightSync:
    """`update` makes the replicas sample with the weights of a version (optimizer steps done), `tend` brings
    those back that went away.

    directory: for the weights of a replica that is back. sleeps: replicas share their GPUs with the trainer,
    and give up their memory with `sleep` until the next update. first_version: of the weights that replicas
    begin with; None: unknown.
    """

    def __init__(
        self,
        replicas: Replicas,
        transfer: Transfer,
        gateway_url: str,
        directory: Path,
        sleeps: bool = False,
        first_version: int | None = 0,
    ) -> None:
        self._replicas = replicas
        self._transfer = transfer
        self._gateway_url = gateway_url
        self._directory = directory
        self._sleeps = sleeps
        self._asleep = False
        self._version: int | None = None  # the last one sent; None: replicas hold what they began with
        self._first_version = first_version
        for url in replicas.urls:
            self._tell_gateway(url, first_version, open=True)

    def update(self, version: int, specs: TensorSpecs, weights: NamedTensors) -> None:
        """Raises ServiceError with replica and phase. Requests wait meanwhile and are not lost."""
        began = time.monotonic()
        there = self._replicas.only(self._there())
        try:
            there.reach("/wake_up?tags=weights" if self._asleep else "/pause?mode=keep")
            self._transfer.send(there, version, specs, weights)
            there.reach("/reset_prefix_cache")
            for url in there.urls:
                self._tell_gateway(url, version)
        finally:
            there.reach("/wake_up?tags=kv_cache" if self._asleep else "/resume")
            self._leave_out(there.lost)
        self._asleep = False
        self._version = version
        log.info("weights of step %d sent in %.2f s", version, time.monotonic() - began)

    def sleep(self) -> None:
        """Let the replicas free their GPU memory; `update` wakes them."""
        if self._sleeps:
            there = self._replicas.only(self._there())
            there.reach("/sleep?level=2")
            self._leave_out(there.lost)
            self._asleep = True

    def tend(self, weights: Callable[[], NamedTensors]) -> None:
        """Give replicas that are back the weights of the last update, and requests again."""
        held = self._replicas.only(self._held())
        ill = held.ill()
        back = self._replicas.only([url for url in held.urls if url not in ill])
        if not back.urls:
            return
        if self._version is not None:
            self._transfer.forget()
            write_weights(self._directory, weights(), self._version)
            reload_weights(back, self._directory)
            back.reach("/reset_prefix_cache")
            back.reach("/resume")  # one that only its connection failed may still be paused
            shutil.rmtree(self._directory)
        for url in back.urls:
            log.info("the engine at %s is back, with the weights of step %s", url, self._version or 0)
            known = self._first_version if self._version is None else self._version
            self._tell_gateway(url, known, open=True)

    def close(self) -> None:
        self._transfer.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _there(self) -> list[str]:
        held = self._held()
        away = {url: reason for url, reason in self._replicas.ill().items() if url not in held}
        self._leave_out(away)
        return [url for url in self._replicas.urls if url not in held and url not in away]

    def _leave_out(self, away: dict[str, str]) -> None:
        """No requests for them until `tend` finds them back. away: why, by url."""
        for url, reason in away.items():
            log.warning("the engine at %s is away: %s", url, reason)
            self._tell_gateway(url, None, open=False)

    def _held(self) -> list[str]:
        return self._ask_gateway("/stats")["held"]

    def _tell_gateway(self, url: str, version: int | None, **state: bool) -> None:
        self._ask_gateway("/engine", {"url": url, "weights_version": version} | state)

    def _ask_gateway(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            return _request(f"{self._gateway_url}{path}", data, PHASE_TIMEOUT_S, keys.RUN)
        except (OSError, http.client.HTTPException) as error:
            raise ServiceError(f"the gateway did not answer {path}: {error}") from None


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
        _request(f"{url}/health", None, _HEALTH_TIMEOUT_S, keys.ENGINE)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return ""


def _request(url: str, data: bytes | None, timeout_s: float, key: str) -> Any:
    headers = {"Content-Type": "application/json"} | keys.header_of(key)
    request = urllib.request.Request(url, data, headers)
    with open_url(request, timeout_s) as response:
        text = response.read()
    return json.loads(text) if text.strip() else None
