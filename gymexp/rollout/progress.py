"""How far the rollouts in flight are, for the live view."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """The state of a collection, or of the groups in flight. total, done: rollouts. tokens: sampled by the
    policy since it began."""

    total: int
    began: float  # time.monotonic()
    done: int = 0
    in_flight: int = 0
    failed: int = 0
    retried: int = 0
    tokens: int = 0
