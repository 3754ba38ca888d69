"""The trainer's weights brought to every replica of the engine, in the trainer's process.

For each new version: requests are paused and kept, the weights sent (`gymexp.engine.transfer`), the prefix
cache dropped, requests resumed. A replica that went away, and is back, holds the weights it began with: the
gateway keeps requests from it until `tend` has sent it the policy's own. Every request to a replica has a
deadline; what fails names the replica and the phase. A replica that goes away during an update is left out of
the rest of it, except where the others wait for it in NCCL, or copy from the trainer's memory.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from gymexp.engine.admission import Admission
from gymexp.engine.replicas import (
    NamedTensors,
    Replicas,
    TensorSpecs,
    reload_weights,
    write_weights,
)
from gymexp.engine.transfer import Transfer

log = logging.getLogger(__name__)


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
        admission: Admission,
        directory: Path,
        sleeps: bool = False,
        first_version: int | None = 0,
    ) -> None:
        self._replicas = replicas
        self._transfer = transfer
        self._admission = admission
        self._directory = directory
        self._sleeps = sleeps
        self._asleep = False
        self._version: int | None = None  # the last one sent; None: replicas hold what they began with
        self._first_version = first_version
        for url in replicas.urls:
            admission.open(url, first_version)

    def update(self, version: int, specs: TensorSpecs, weights: NamedTensors) -> None:
        """Raises ServiceError with replica and phase. Requests wait meanwhile and are not lost."""
        began = time.monotonic()
        there = self._replicas.only(self._there())
        try:
            there.reach("/wake_up?tags=weights" if self._asleep else "/pause?mode=keep")
            self._transfer.send(there, version, specs, weights)
            there.reach("/reset_prefix_cache")
            for url in there.urls:
                self._admission.updated(url, version)
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
        held = self._replicas.only(self._admission.on_hold())
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
            self._admission.open(url, known)

    def close(self) -> None:
        self._transfer.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _there(self) -> list[str]:
        held = self._admission.on_hold()
        away = {url: reason for url, reason in self._replicas.ill().items() if url not in held}
        self._leave_out(away)
        return [url for url in self._replicas.urls if url not in held and url not in away]

    def _leave_out(self, away: dict[str, str]) -> None:
        """No requests for them until `tend` finds them back. away: why, by url."""
        for url, reason in away.items():
            log.warning("the engine at %s is away: %s", url, reason)
            self._admission.hold(url)
