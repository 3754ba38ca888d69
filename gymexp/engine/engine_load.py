"""The share of a step in which the engine had nothing to do, from what the gateways counted."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from gymexp.engine.admission import Admission
from gymexp.errors import ServiceError


class EngineLoad:
    """Compares the gateways' sums of load with those at the last call."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._last: Sequence[Any] | None = None

    def since_last(self) -> dict[str, float]:
        """Returns idle/engine, the share of the time since the last call in which a replica had no request,
        and engine/in_flight, the mean number of its requests; both as means over the replicas. Empty at the
        first call, and if a gateway does not answer or was started again meanwhile.

        Several gateways send requests to the same replicas, and each knows its own alone. Then idle/engine is
        the most that it can be.
        """
        try:
            now = self._admission.loads()
        except ServiceError:
            self._last = None
            return {}
        last, self._last = self._last, now
        if last is None or any(a["seconds"] > b["seconds"] for a, b in zip(last, now, strict=True)):
            return {}
        pairs = [(a, b, b["seconds"] - a["seconds"]) for a, b in zip(last, now, strict=True)]
        if not all(seconds for _, _, seconds in pairs):
            return {}

        def shares(name: str, url: str) -> list[float]:
            return [(b[name][url] - a[name][url]) / seconds for a, b, seconds in pairs]

        urls = list(now[0]["busy_s"])
        return {
            "idle/engine": fmean(1 - min(1.0, max(shares("busy_s", url))) for url in urls),
            "engine/in_flight": fmean(sum(shares("request_s", url)) for url in urls),
        }
