"""Spreads the requests of several gateways over the engines that they share. Pure.

The gateways do not know of each other's requests. A group's rollouts begin with the same prompt, and may
reach different gateways. An engine that has computed a prompt has its keys and values in its prefix cache. So
each gateway ranks the engines by the prompt and takes the first one that is not too busy. All gateways come
to the same order, and an engine that goes away changes it for its own prompts alone (rendezvous hashing).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from gymexp.rollout.tokens import ids_digest

# By how much an engine's requests of one gateway may exceed their mean over the engines. A smaller bound
# spreads them more evenly, a larger one computes fewer prompts twice (`benchmarks/spread.py`).
_BOUND = 1.1


def engine_for(prompt_ids: Sequence[int], in_flight: Mapping[str, int]) -> str:
    """Returns the URL of the engine for a prompt. in_flight: this gateway's requests at each open engine."""
    if len(in_flight) == 1:
        return next(iter(in_flight))
    prompt = ids_digest(prompt_ids)
    ranked = sorted(in_flight, key=lambda url: hashlib.blake2b(prompt + url.encode()).digest())
    bound = _BOUND * (sum(in_flight.values()) + 1) / len(in_flight)
    return next(url for url in ranked if in_flight[url] < bound)
