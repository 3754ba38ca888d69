"""The space of a search: the keys of `search.params` with their ranges and choices. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_RANGE = ("low", "high", "log", "step")


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens the tree of `search.params` into dotted keys: `{"trainer.learning_rate": {"low": …}}`."""
    spaces: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping) and not ({"low", "high"} & value.keys()):
            spaces |= flat(value, f"{prefix}{name}.")
        else:
            spaces[prefix + name] = value
    return spaces


def ends(space: Any) -> list[Any]:
    """Returns the values to check of a key's space: both ends of a range, or every choice."""
    return [space["low"], space["high"]] if isinstance(space, Mapping) else list(space)


def problems_of_space(params: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each mistake in `search.params`."""
    for key, space in flat(params).items():
        at = f"search.params.{key}"
        if isinstance(space, list):
            if not space or not all(isinstance(v, bool | int | float | str) or v is None for v in space):
                yield f"{at} must be a list of plain values to choose from, got {space!r}"
        elif not isinstance(space, Mapping):
            yield f"{at} must be a list of choices, or {{low: …, high: …}}, got {space!r}"
        elif unknown := sorted(set(space) - set(_RANGE)):
            yield f"{at} has keys that no range has: {', '.join(unknown)}. A range has {', '.join(_RANGE)}"
        else:
            yield from _range_problems(at, space)


def _range_problems(at: str, space: Mapping[str, Any]) -> Iterator[str]:
    low, high, step = (space.get(key) for key in ("low", "high", "step"))
    numbers = [v for v in (low, high) if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < 2 or not numbers[0] < numbers[1]:
        yield f"{at} must be a range of two numbers with low < high, got low={low!r}, high={high!r}"
    elif space.get("log") and not numbers[0] > 0:
        yield f"{at}.low must be > 0 with log=true, got {low!r}"
    elif space.get("log") and step is not None:
        yield f"{at}.step must not be set with log=true, got {step!r}"
    elif step is not None and not (isinstance(step, int | float) and step > 0):
        yield f"{at}.step must be > 0, got {step!r}"
