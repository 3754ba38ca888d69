"""Draws the tasks of each batch by weights that change over steps, and by what the policy achieved. Pure.

Without `dataset.schedule` and `dataset.sampling=difficulty` a run has a fixed order instead
(`gymexp.data.mix`).
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gymexp.config.schema import DatasetConfig
from gymexp.data.weights import PARTS, Weights

# A task that keeps giving equal rewards rests for at most 2**_MOST - 1 rounds.
_MOST = 5


@dataclass
class _Queue:
    """An environment's way through its tasks: round after round, each in an order of its own.

    owed: the tasks that its shares so far are ahead of its draws, in parts of `PARTS`. place: of the next
    task in the order of the round. rests: by a task's index how many of its last groups had equal rewards,
    and the round in which it comes back.
    """

    owed: int = 0
    round: int = 0
    place: int = 0
    rests: dict[int, tuple[int, int]] = field(default_factory=dict)

    def num_resting(self) -> int:
        return sum(back > self.round for _, back in self.rests.values())


@dataclass
class _State:
    queues: dict[str, _Queue]
    # (environment, index, round) of each task of the batch whose results are not known yet
    pending: list[tuple[str, int, int]] = field(default_factory=list)


def draws_tasks(dataset: DatasetConfig) -> bool:
    """Returns whether a curriculum draws the tasks of a run."""
    return bool(dataset.schedule) or dataset.sampling == "difficulty"


class Curriculum:
    """Draws batches of tasks. What it draws depends on its arguments and on the results alone.

    Weights. Each environment has its share of every batch: in the tasks drawn so far, an environment is never
    more than n - 1 tasks behind the sum of its shares, nor a whole task ahead, for n environments; with two
    environments both stay within one. An environment of weight 0 gets no task.

    Tasks. An environment plays its tasks in rounds, each shuffled anew, and a task comes once a round. With
    `by_difficulty`, a task rests if all rewards of its group were equal (always or never solved: its
    advantages are 0, so it teaches nothing). After z such groups in a row it comes back in the 2**z-th round
    from its last one, at most the 32nd. A group with different rewards ends this. So no task is given up. If
    all tasks of an environment rest, the round is the next in which one comes back.

    Source: Zheng et al., "Act Only When It Pays" (GRESO, 2025), which skips such a prompt with a probability
    that grows with z, so that its expected wait is p**-z visits; this is p = 1/2 without the chance, so that
    a resumed run needs no random state. What DAPO (Yu et al., 2025) filters after the rollouts is seldom
    played in the first place.
    """

    def __init__(
        self, tasks: Mapping[str, Sequence[str]], weights: Weights, seed: int, by_difficulty: bool
    ) -> None:
        """tasks: the keys of each environment's tasks."""
        self._tasks = {env: list(keys) for env, keys in tasks.items()}
        self._weights = weights
        self._seed = seed
        self._by_difficulty = by_difficulty
        self._state = _State({env: _Queue() for env in sorted(self._tasks)})
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def draw(self, step: int, count: int) -> list[str]:
        """Returns the keys of the `count` tasks of a batch that is played after `step` steps."""
        queues = self._state.queues
        self._state.pending = []
        keys = []
        for env in share_out_batch(queues, self._weights.shares(step), count):
            queue = queues[env]
            index = self._next(env, queue)
            self._state.pending.append((env, index, queue.round))
            keys.append(self._tasks[env][index])
        return keys

    def learn(self, equal: Sequence[bool | None]) -> None:
        """Takes the results of the last batch, in its order: for each task whether all rewards of its group
        were equal; None if fewer than two of its rollouts have a reward."""
        for (env, index, played_in), flat in zip(self._state.pending, equal, strict=True):
            if flat is None or not self._by_difficulty:
                continue
            rests = self._state.queues[env].rests
            times = min(rests.get(index, (0, 0))[0] + 1, _MOST)
            if flat:
                rests[index] = times, played_in + 2**times
            else:
                rests.pop(index, None)
        self._state.pending = []

    def metrics(self, step: int) -> dict[str, dict[str, float]]:
        """Returns the metrics of the batch that was drawn last, at `step`, by environment.

        weight: the share by the weights. share: the share of the batch's tasks. resting: tasks at rest.
        """
        drawn = Counter(env for env, _, _ in self._state.pending)
        shares = self._weights.shares(step)
        return {
            env: {
                "weight": shares[env] / PARTS,
                "share": drawn[env] / max(1, drawn.total()),
                "resting": queue.num_resting(),
            }
            for env, queue in self._state.queues.items()
        }

    def snapshot(self) -> _State:
        """Returns a copy of the state, which later draws do not change, for `restore` and `to_json`."""
        return copy.deepcopy(self._state)

    def restore(self, state: _State) -> None:
        """Goes back to a state that `snapshot` or `from_json` returned."""
        self._state = copy.deepcopy(state)

    def _next(self, env: str, queue: _Queue) -> int:
        """Returns the index of the environment's next task that does not rest, and moves on behind it."""
        while True:
            order = self._order(env, queue.round)
            while queue.place < len(order):
                index = order[queue.place]
                queue.place += 1
                if queue.rests.get(index, (0, 0))[1] <= queue.round:
                    return index
            back = min(queue.rests.get(index, (0, 0))[1] for index in range(len(order)))
            queue.round, queue.place = max(queue.round + 1, back), 0

    def _order(self, env: str, number: int) -> list[int]:
        if self._orders.get(env, (-1, []))[0] != number:
            order = list(range(len(self._tasks[env])))
            random.Random(f"{self._seed}/{env}/{number}").shuffle(order)
            self._orders[env] = number, order
        return self._orders[env][1]


def share_out_batch(queues: Mapping[str, _Queue], shares: Mapping[str, int], count: int) -> list[str]:
    """Returns the environments of a batch's `count` tasks, in order. Counts in `owed` what they got.

    At each place the environment to which most is owed gets a task.
    """
    envs = []
    for _ in range(count):
        for env, queue in queues.items():
            queue.owed += shares[env]
        first = max((env for env in queues if shares[env]), key=lambda env: queues[env].owed)
        queues[first].owed -= PARTS
        envs.append(first)
    return envs


def count_tasks(weights: Weights, envs: Sequence[str], steps: Sequence[int], count: int) -> Counter[str]:
    """Returns how many tasks of each environment the batches of a run have together; they do not depend on
    the results. steps: the number of steps before each batch. count: tasks of a batch."""
    queues = {env: _Queue() for env in sorted(envs)}
    return Counter(env for step in steps for env in share_out_batch(queues, weights.shares(step), count))


def to_json(state: _State) -> dict[str, Any]:
    """Returns a state as plain data, for a checkpoint."""
    assert not state.pending, "the results of a batch belong to its state"
    return {
        env: {
            "owed": queue.owed,
            "round": queue.round,
            "place": queue.place,
            "rests": [[index, *rest] for index, rest in sorted(queue.rests.items())],
        }
        for env, queue in state.queues.items()
    }


def from_json(plain: Mapping[str, Any]) -> _State:
    """Returns the state that `to_json` made plain. Raises KeyError, TypeError or ValueError for others."""
    return _State(
        {
            env: _Queue(
                int(queue["owed"]),
                int(queue["round"]),
                int(queue["place"]),
                {int(index): (int(times), int(back)) for index, times, back in queue["rests"]},
            )
            for env, queue in plain.items()
        }
    )
