"""How busy a gateway has kept each engine: for how long it had requests there, and how many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any


class Load:
    """Sums over time since the process began, in seconds. in_flight: the requests at each engine now."""

    def __init__(self, urls: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.in_flight = dict.fromkeys(urls, 0)
        self._clock = clock
        self._began = self._last = clock()
        self._busy_s = dict.fromkeys(self.in_flight, 0.0)
        self._request_s = dict.fromkeys(self.in_flight, 0.0)

    def change(self, url: str, by: int) -> None:
        """Notes that requests have begun (by > 0) or ended at an engine."""
        self._go_on()
        self.in_flight[url] += by

    def totals(self) -> dict[str, Any]:
        """Returns seconds, since the process began; busy_s by engine, of these the seconds with a request;
        request_s by engine, the sum of all requests' seconds so far."""
        self._go_on()
        return {"seconds": self._last - self._began, "busy_s": self._busy_s, "request_s": self._request_s}

    def _go_on(self) -> None:
        now = self._clock()
        for url, count in self.in_flight.items():
            if count:
                self._busy_s[url] += now - self._last
                self._request_s[url] += count * (now - self._last)
        self._last = now
