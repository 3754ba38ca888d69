"""Seeds of the policy's draws: one for each sampling call, reproducible, shared with no other call.

An engine starts a generator anew from the seed of each request. NeMo Gym repeats a rollout's seed with every
turn. Two turns with one seed would take their tokens at the same places of the cumulative distribution: later
turns would repeat earlier draws, and their log-probabilities would look right. So the gateway derives each
call's seed from the rollout's and from what the call continues.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

REMEMBERED_PROMPTS = 65536


def attempt_seed(rollout_seed: int, num_failures: int) -> int:
    """The seed of a rollout's attempt after `num_failures` failed ones; the first has the rollout's own.

    An attempt whose server was restarted under it has not failed: it is played again with the same seed, and
    so with the same draws. Other draws would favour the rollouts that end before a server does.
    """
    return rollout_seed if num_failures == 0 else _hash(f"attempt/{rollout_seed}/{num_failures}".encode())


def call_seed(rollout_seed: int, prompt_ids: Sequence[int], repeat: int = 0) -> int:
    """The seed of one sampling call, in [0, 2**31), which every engine takes.

    prompt_ids: what the call continues. A later turn's prompt is longer, so each turn of a rollout has a seed
    of its own. repeat: how many calls of the rollout have continued these very ids before.
    """
    return _hash(f"call/{rollout_seed}/{repeat}/".encode() + array("q", prompt_ids).tobytes())


class CallSeeds:
    """Seeds for the calls of many rollouts at once.

    An agent may ask for several replies to one prompt (a vote, a second try): each gets a seed of its own.
    What is remembered for that is bounded, and lost with the process: so are the rollouts in flight.
    """

    def __init__(self, remembered: int = REMEMBERED_PROMPTS) -> None:
        self._remembered = remembered
        self._taken: OrderedDict[tuple[str, int], set[int]] = OrderedDict()

    @contextmanager
    def take(self, play: str | None, rollout_seed: int, prompt_ids: Sequence[int]) -> Iterator[int]:
        """The seed of a call that is made within the block. A call that fails gives its seed back: made
        again, it draws the same.

        play: names one playing of a rollout; None for a client that names none, to whom the same seed and
        prompt give the same reply.
        """
        if play is None:
            yield call_seed(rollout_seed, prompt_ids)
            return
        key = play, call_seed(rollout_seed, prompt_ids)
        taken = self._taken.setdefault(key, set())
        repeat = next(number for number in range(len(taken) + 1) if number not in taken)
        taken.add(repeat)
        if len(self._taken) > self._remembered:
            self._taken.popitem(last=False)
        try:
            yield call_seed(rollout_seed, prompt_ids, repeat)
        except BaseException:
            taken.discard(repeat)
            raise


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2s(data, digest_size=4).digest(), "big") >> 1
