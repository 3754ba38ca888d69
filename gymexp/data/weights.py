"""The environments' weights at each step of training, by `env.<name>.weight` and `dataset.schedule`. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction

from gymexp.config.schema import RunConfig

# Shares are whole numbers of this many parts, so that sums over any number of steps stay exact.
PARTS = 10**9


class Weights:
    """The weights of the environments after any number of steps.

    constant: by environment. schedule: the weights by step, of the same environments at each; they take the
    place of the constant ones. Between two steps of the schedule a weight changes linearly. Before the first
    step it has that step's value, and after the last step that step's.
    """

    def __init__(
        self, constant: Mapping[str, float], schedule: Mapping[int, Mapping[str, float]] | None = None
    ) -> None:
        self._constant = {env: _exact(weight) for env, weight in constant.items()}
        self._points = [
            (step, {env: _exact(weight) for env, weight in weights.items()})
            for step, weights in sorted((schedule or {}).items())
        ]
        self._steps = [step for step, _ in self._points]

    @classmethod
    def of(cls, config: RunConfig) -> Weights:
        """Returns the weights of a run."""
        return cls({name: env.weight for name, env in config.env.items()}, config.dataset.schedule)

    def at(self, step: int) -> dict[str, Fraction]:
        """Returns the weight of each environment for a batch that is played after `step` steps."""
        if not self._points:
            return dict(self._constant)
        after = bisect_right(self._steps, step)
        first, low = self._points[max(0, after - 1)]
        last, high = self._points[min(after, len(self._points) - 1)]
        way = Fraction(step - first, last - first) if first < step < last else Fraction(0)
        return self._constant | {env: weight + (high[env] - weight) * way for env, weight in low.items()}

    def shares(self, step: int) -> dict[str, int]:
        """Returns the environments' shares of such a batch, in parts of `PARTS`, whose sum they are. An
        environment without a weight has share 0. The order is alphabetical."""
        weights = dict(sorted(self.at(step).items()))
        total = sum(weights.values())
        shares, before = {}, Fraction(0)
        for env, weight in weights.items():
            shares[env] = round((before + weight) / total * PARTS) - round(before / total * PARTS)
            before += weight
        return shares

    def ever(self) -> list[str]:
        """Returns the environments that have a weight > 0 at some step, in their order."""
        points = [weights for _, weights in self._points] or [self._constant]
        return [env for env in self._constant if any((self._constant | p)[env] > 0 for p in points)]


def _exact(weight: float) -> Fraction:
    # Fraction(str(0.1)) is exactly 1/10, so weights 0.1 and 0.3 are exactly one to three.
    return Fraction(str(weight))
