"""Sends the trainer's weights to every replica of the engine, from the trainer's process.

An update to a new version never meets a request. Each gateway fences the replicas, so that further requests
wait. The requests in flight are cut, or end by themselves. Once none is in flight, the weights are sent
(`gymexp.engine.weight_transfer`), the prefix caches are dropped, the replicas resume, and the gateways lift
the fence and continue the generations that were cut. So each piece of a generation has one version.

A replica that went away and came back has the weights that it began with: the gateways keep it on hold until
`tend` has sent it the policy's weights. Every request to a replica has a deadline, and an error names the
replica and the phase. A replica that goes away during an update is left out of the rest of the update. With
nccl and ipc a replica that goes away during the transfer itself makes the update fail.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gymexp.engine.admission import Admission
from gymexp.engine.replicas import (
    NamedTensors,
    Replicas,
    TensorSpecs,
    reload_weights,
    write_weights,
)
from gymexp.engine.weight_transfer import Transfer
from gymexp.errors import ServiceError

log = logging.getLogger(__name__)

# The gateway itself gives up a generation after 1,800 s.
_LONGEST_GENERATION_S = 2000.0
# A cut request answers within milliseconds; a long one, of a busy engine, within a second or two.
_ANSWER_S = 1.0
_MAX_CUTS = 5


class WeightSync:
    """Keeps the replicas at the policy's weights: `update` sends a new version (counted in optimizer steps
    done) to all, and `tend` sends the last version to replicas that went away and came back.

    directory: for a file of weights that `tend` writes. sleeps: whether the replicas share their GPUs with
    the trainer, and free their GPU memory from `sleep` to the next update. first_version: of the weights that
    the replicas begin with; None if it is unknown. cuts: whether an update cuts the requests in flight; else
    it waits until they end, unless end_requested is set.
    """

    def __init__(
        self,
        replicas: Replicas,
        transfer: Transfer,
        admission: Admission,
        directory: Path,
        sleeps: bool = False,
        first_version: int | None = 0,
        cuts: bool = True,
        end_requested: threading.Event | None = None,
    ) -> None:
        self._replicas = replicas
        self._transfer = transfer
        self._admission = admission
        self._directory = directory
        self._sleeps = sleeps
        self._asleep = False
        self._cuts = cuts
        self._end_requested = end_requested or threading.Event()
        self._version: int | None = None  # the last one sent; None before the first update
        self._first_version = first_version
        for url in replicas.urls:
            admission.open(url, first_version)

    def update(self, version: int, specs: TensorSpecs, weights: NamedTensors) -> None:
        """Sends the weights of `version` to all healthy replicas, also to those that were away and are back.
        Requests wait during the update or are cut, and are not lost. specs: name, dtype and shape of each
        weight.

        Raises ServiceError, which names the replica and the phase.
        """
        began = time.monotonic()
        open_urls, back_urls = self._healthy_urls()
        if self._sleeps:
            back_urls = []
        if back_urls:
            self._transfer.forget()
        available = self._replicas.only(open_urls + back_urls)
        try:
            if self._asleep:
                available.reach("/wake_up?tags=weights")
            else:
                self._clear(available)
            cleared = time.monotonic()
            self._transfer.send(available, version, specs, weights)
            available.reach("/reset_prefix_cache")
        finally:
            available.reach("/wake_up?tags=kv_cache" if self._asleep else "/resume")
            self._put_on_hold(available.lost)
        self._admission.updated(available.urls, version)
        self._open([url for url in available.urls if url in back_urls], version)
        self._asleep = False
        self._version = version
        seconds = time.monotonic() - began
        log.info("weights of step %d sent in %.2f s (fence %.2f s)", version, seconds, cleared - began)

    def _clear(self, available: Replicas) -> None:
        """Fences the replicas and pauses them, and returns once no request is in flight. Raises ServiceError
        if that takes too long."""
        self._admission.fence(available.urls)
        if not self._cuts:
            self._await_ends(available)
        # A request may arrive at a replica behind the pause, so the pause is repeated. A replica whose
        # requests do not answer even so loses them, and the gateway sends them again after the update.
        for number in range(_MAX_CUTS):
            available.reach("/pause?mode=abort")
            is_last = number == _MAX_CUTS - 1
            if not self._admission.in_flight(available.urls, _ANSWER_S, cut=is_last):
                return
        raise ServiceError(f"weights: requests were in flight at {', '.join(available.urls)} after all cuts")

    def _await_ends(self, available: Replicas) -> None:
        """Returns once no request is in flight, or once the run must end. Raises ServiceError if that takes
        longer than any generation may take."""
        deadline = time.monotonic() + _LONGEST_GENERATION_S
        while left := self._admission.in_flight(available.urls, _ANSWER_S):
            if self._end_requested.is_set():
                return
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"weights: {left} requests were in flight at {', '.join(available.urls)} for "
                    f"{_LONGEST_GENERATION_S:.0f} s; overlap.update=abort does not wait for them"
                )

    def sleep(self) -> None:
        """Makes replicas that share GPUs with the trainer free their GPU memory until the next `update`."""
        if self._sleeps:
            available = self._replicas.only(self._healthy_urls()[0])
            # At level 2 a replica drops its weights, at level 1 it keeps them in the memory of its node.
            available.reach(f"/sleep?level={2 if self._transfer.sends_all else 1}")
            self._put_on_hold(available.lost)
            self._asleep = True

    def tend(self, weights: Callable[[], NamedTensors | None]) -> None:
        """Sends the weights of the last update to the replicas on hold that are healthy again, and takes them
        off hold.

        weights: called to get the weights if there are such replicas; None if they cannot be had before the
        next update, which then sends them. Raises ServiceError if no other replica samples until then.
        """
        version = self._first_version if self._version is None else self._version
        on_hold = self._replicas.only(self._admission.on_hold())
        self._admission.introduce(version)
        ill = on_hold.ill()
        back = self._replicas.only([url for url in on_hold.urls if url not in ill])
        if not back.urls:
            return
        if self._version is not None:
            if not self._transfer.again(back, self._version) and not self._send_file(back, weights()):
                if len(on_hold.urls) == len(self._replicas.urls):
                    raise ServiceError(
                        "all engines were lost, and the policy's weights, which are sharded, cannot be sent "
                        "to one that is back before the next step: resume the run"
                    )
                return
            self._transfer.forget()
            back.reach("/reset_prefix_cache")
            back.reach("/resume")  # a replica that lost only its connection may still be paused
        self._open(back.urls, version)

    def _send_file(self, back: Replicas, weights: NamedTensors | None) -> bool:
        """Sends the weights of the last update by a file. Returns False if there are none."""
        if weights is None or self._version is None:
            return False
        write_weights(self._directory, weights, self._version)
        reload_weights(back, self._directory)
        shutil.rmtree(self._directory)
        return True

    def _open(self, urls: Sequence[str], version: int | None) -> None:
        for url in urls:
            log.info("the engine at %s is back, with the weights of step %s", url, self._version or 0)
            self._admission.open(url, version)

    def close(self) -> None:
        self._transfer.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _healthy_urls(self) -> tuple[list[str], list[str]]:
        """Returns the urls of the healthy replicas: of those that get requests, and of those on hold. Puts
        those on hold that are ill."""
        on_hold, ill = self._admission.on_hold(), self._replicas.ill()
        self._put_on_hold({url: reason for url, reason in ill.items() if url not in on_hold})
        healthy = [url for url in self._replicas.urls if url not in ill]
        return [url for url in healthy if url not in on_hold], [url for url in healthy if url in on_hold]

    def _put_on_hold(self, reasons: dict[str, str]) -> None:
        """Puts replicas on hold until `tend` finds them healthy again. reasons: why each is away, by url."""
        for url, reason in reasons.items():
            log.warning("the engine at %s is away: %s", url, reason)
            self._admission.hold(url)
