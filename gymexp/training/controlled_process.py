"""What the processes that the controller watches for their work have in common: trainer and evaluator."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack
from typing import TYPE_CHECKING, NoReturn

from gymexp import files
from gymexp.config.schema import RunConfig
from gymexp.errors import GymexpError
from gymexp.printable import log_to_stderr
from gymexp.processes.access_keys import RUN, header_of
from gymexp.processes.http_client import open_url
from gymexp.processes.parent_watch import die_with_parent
from gymexp.record.services_file import Services

if TYPE_CHECKING:
    from gymexp.rollout.collect import Collector
    from gymexp.training.callbacks import ProgressReporter

_HEARTBEAT_S = 5.0


def begin() -> threading.Event:
    """Ties the process to its parent, and logs to stderr. Returns an event that SIGTERM sets; the controller
    handles Ctrl-C."""
    die_with_parent()
    log_to_stderr("%(asctime)s %(name)s: %(message)s")
    stop_requested = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop_requested.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return stop_requested


def end() -> NoReturn:
    """Ends the process, whose files are all written: no thread may keep it alive."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def message_of(error: Exception) -> str:
    """Returns an error that a user can do something about as text; empty for a bug."""
    if isinstance(error, GymexpError):
        return str(error)
    refused = files.refusal(error)
    return files.in_words(refused) if refused else ""


def send_heartbeats(control_url: str, name: str) -> None:
    """Sends the controller a sign of life of the process `name` every few seconds, from a thread."""
    request = urllib.request.Request(f"{control_url}/alive/{name}", b"", header_of(RUN))

    def send() -> None:
        while True:
            with contextlib.suppress(OSError):
                open_url(request, timeout_s=_HEARTBEAT_S).close()
            time.sleep(_HEARTBEAT_S)

    threading.Thread(target=send, name="alive", daemon=True).start()


def open_collector(
    config: RunConfig,
    services: Services,
    vocab_size: int | None,
    reporter: ProgressReporter,
    stop_requested: threading.Event,
    stack: ExitStack,
) -> Collector:
    """Opens the collector of rollouts, which stops as soon as `stop_requested` is set. `stack` closes it."""
    from gymexp.rollout.collect import Collector

    collector = Collector(
        services.replicas,
        config.env,
        config.rollout,
        vocab_size,
        services.control_url,
        services.gateway_urls,
        reporter.report_collection,
    )
    stack.callback(collector.close)
    threading.Thread(target=lambda: (stop_requested.wait(), collector.stop()), daemon=True).start()
    return collector
