"""Derives the seeds of the policy's draws: reproducible, and a different one for each sampling call.

An engine starts a new generator from the seed of each request, and NeMo Gym sends a rollout's seed with every
turn. Two turns with the same seed would take their tokens at the same places of the cumulative distribution:
later turns would repeat the draws of earlier ones, though their log-probabilities would look right. So the
gateway derives each call's seed from the rollout's seed and from the ids that the call continues.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gymexp.rollout.tokens import ids_bytes

REMEMBERED_PROMPTS = 65536


def attempt_seed(rollout_seed: int, num_failures: int) -> int:
    """Returns the seed of a rollout's attempt that follows `num_failures` failed attempts. The first attempt
    has the rollout's own seed.

    An attempt whose server was restarted during it has not failed. It is played again with the same seed, and
    so with the same draws. Other draws would favour the rollouts that end before a server does.
    """
    return rollout_seed if num_failures == 0 else _hash(f"attempt/{rollout_seed}/{num_failures}".encode())


def call_seed(rollout_seed: int, prompt_ids: Sequence[int], repeat: int = 0) -> int:
    """Returns the seed of one sampling call, in [0, 2**31), a range that every engine takes.

    prompt_ids: the ids that the call continues. A later turn's prompt is longer, so each turn of a rollout
    has a seed of its own. repeat: how many earlier calls of the rollout have continued the same ids.
    """
    return _hash(f"call/{rollout_seed}/{repeat}/".encode() + ids_bytes(prompt_ids))


def piece_seed(seed: int, num_done: int) -> int:
    """Returns the seed of the piece of a sampling call that begins after `num_done` tokens. Every update of
    the weights cuts a call into one more piece.

    seed: of the call, which its first piece has. An engine starts a new generator for each piece, so a seed
    that pieces share would repeat the draws of the first piece. A piece without tokens may share its seed
    with the piece that follows it, as none of its draws counts.
    """
    return seed if num_done == 0 else _hash(f"piece/{seed}/{num_done}".encode())


class CallSeeds:
    """Hands out seeds for the sampling calls of many rollouts at once.

    An agent may request several replies to one prompt (a vote, a second try), and each reply gets a seed of
    its own. For that, the object remembers the calls of at most `capacity` prompts. They are lost with the
    process, as the rollouts in flight are.
    """

    def __init__(self, capacity: int = REMEMBERED_PROMPTS) -> None:
        self._capacity = capacity
        self._taken: OrderedDict[tuple[str, int], set[int]] = OrderedDict()

    @contextmanager
    def take(self, play: str | None, rollout_seed: int, prompt_ids: Sequence[int]) -> Iterator[int]:
        """Gives the seed of a call that is made within the block. If the call raises, its seed is free again,
        so that a repeated call draws the same.

        play: the name of one attempt at a rollout; None for a client that gives no name. To such a client the
        same seed and prompt give the same reply.
        """
        if play is None:
            yield call_seed(rollout_seed, prompt_ids)
            return
        key = play, call_seed(rollout_seed, prompt_ids)
        taken = self._taken.setdefault(key, set())
        repeat = next(number for number in range(len(taken) + 1) if number not in taken)
        taken.add(repeat)
        if len(self._taken) > self._capacity:
            self._taken.popitem(last=False)
        try:
            yield call_seed(rollout_seed, prompt_ids, repeat)
        except BaseException:
            taken.discard(repeat)
            raise


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2s(data, digest_size=4).digest(), "big") >> 1
