"""Rules of a single value, which yield a line with the key, the rule and the value."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from gymexp.config.suggestions import nearest


def one_of(key: str, value: Any, allowed: tuple[str | None, ...]) -> Iterator[str]:
    """Yields a problem unless `value` is one of the allowed ones."""
    if value not in allowed:
        names = [name for name in allowed if name is not None]
        near = nearest(str(value), names)
        yield f"{key} must be one of {', '.join(names)}, got {value!r}{near}"


def at_least(key: str, value: float | None, least: float) -> Iterator[str]:
    """Yields a problem if a value is given and less than `least`."""
    if value is not None and not value >= least:
        yield f"{key} must be >= {least:g}, got {value!r}"


def positive(key: str, value: float | None) -> Iterator[str]:
    """Yields a problem if a value is given and not above 0."""
    if value is not None and not value > 0:
        yield f"{key} must be > 0, got {value!r}"


def not_finite(at: str, value: Any) -> Iterator[str]:
    """Yields a problem for each key at or below `at` whose number is nan or infinite; no key allows these."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{at} must be a finite number, got {value!r}"
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from not_finite(f"{at}.{name}" if at else str(name), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from not_finite(f"{at}[{index}]", inner)
