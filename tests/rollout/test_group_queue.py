"""The queue between two threads: what lands is handed out, errors are raised, a hold starts nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from gymexp.config.schema import RolloutConfig
from gymexp.errors import RolloutError, ServiceError
from gymexp.rollout.group_queue import GroupQueue, rewards_differ
from gymexp.rollout.group_schedule import GroupSchedule
from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Task


def group(*rewards: float | None) -> list[Outcome]:
    task = Task("e/train/0", "e", "a", {})
    return [
        Failed(task, "engine", "gone") if reward is None else Completed(Rollout(task, [], reward, []))
        for reward in rewards
    ]


class Players:
    """What the queue starts; a test lands the groups."""

    def __init__(self, size: int = 2, bound: int = 1, dynamic: bool = True) -> None:
        self.landings: dict[int, Callable[[Any], None]] = {}
        self.num_forgotten = 0
        schedule = GroupSchedule(size, bound, bound, "finished", num_batches=9)
        rollout = RolloutConfig(dynamic_sampling=dynamic, max_resampled=1)
        self.queue = GroupQueue(schedule, size, rollout, self.landings.__setitem__, self._forget)

    def _forget(self, num_rollouts: int) -> None:
        self.num_forgotten += num_rollouts

    def land(self, serial: int, result: Any) -> None:
        self.landings.pop(serial)(result)


def test_a_batch_is_handed_out_as_soon_as_it_has_landed_in_another_thread():
    players = Players()
    players.queue.advance(0)
    assert sorted(players.landings) == [0, 1, 2, 3]
    players.land(2, group(0, 1))
    threading.Timer(0.1, players.land, (0, group(1, 0))).start()
    batch = players.queue.take(lambda: None)
    assert batch.serials == [0, 2] and batch.groups == [group(1, 0), group(0, 1)]
    assert (batch.num_landed, batch.num_in_flight, batch.num_overtaken, batch.left_out) == (0, 2, 1, [])
    assert players.num_forgotten == 4
    assert players.queue.state(0) == {"low": 0, "above": []}, "the step is not done"
    assert players.queue.state(1) == {"low": 1, "above": [[2, 1]]}


def test_a_group_of_equal_rewards_frees_its_place_at_once_but_not_while_the_queue_is_held():
    players = Players()
    players.queue.advance(0)
    players.queue.hold()
    players.land(0, group(1, 1))
    assert sorted(players.landings) == [1, 2, 3] and players.queue.left_out == [group(1, 1)]
    players.queue.release()
    assert sorted(players.landings) == [1, 2, 3, 4]
    players.land(1, group(1, None))
    assert sorted(players.landings) == [2, 3, 4, 5]
    for serial in (2, 3):
        players.land(serial, group(0, 1))
    batch = players.queue.take(lambda: None)
    assert batch.serials == [2, 3] and batch.left_out == [group(1, 1), group(1, None)]
    assert batch.outcomes == [*group(0, 1), *group(0, 1), *group(1, 1), *group(1, None)]
    assert players.num_forgotten == 8 and players.queue.left_out == []


def test_too_many_groups_left_out_in_a_row_end_the_wait():
    players = Players()
    players.queue.advance(0)
    for serial in (0, 1, 2):
        players.land(serial, group(0.5, 0.5))
    with pytest.raises(RolloutError, match=r"left out 3 groups in a row, .* rewards \(0\.5\), more"):
        players.queue.take(lambda: None)


@pytest.mark.parametrize("result", [ValueError("broken"), [object()]])
def test_what_goes_wrong_in_the_collectors_thread_is_raised_at_this_and_each_later_take(result):
    players = Players()
    players.queue.advance(0)
    players.land(0, result)
    for _ in range(2):
        with pytest.raises((ValueError, AttributeError), match=r"broken|no attribute 'rollout'"):
            players.queue.take(lambda: None)
    players.land(1, group(1, 1))
    assert sorted(players.landings) == [2, 3], "nothing is started any more"


def test_what_is_called_meanwhile_may_end_the_wait(monkeypatch):
    monkeypatch.setattr("gymexp.rollout.group_queue._MEANWHILE_S", 0.01)
    players, calls = Players(), []
    players.queue.advance(0)

    def meanwhile() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the engine is lost")

    with pytest.raises(OSError, match="the engine is lost"):
        players.queue.take(meanwhile)


def test_what_has_landed_is_shown_once_a_wanted_group_has_or_none_is_in_flight():
    players = Players(size=1)
    players.queue.advance(0)
    one, other = group(0, 1), group(1, 0)
    players.land(1, one)
    threading.Timer(0.1, players.land, (0, other)).start()
    assert players.queue.landed(other.__eq__, lambda: None) == [other, one]
    assert players.queue.landed(lambda group: False, lambda: None) == [other, one], "no other will land"
    assert players.queue.take(lambda: None).groups == [other], "it is still there"
    players.queue.advance(1)
    players.land(2, ServiceError("gone"))
    assert players.queue.landed(lambda group: False, lambda: None) == [one]
    with pytest.raises(ServiceError, match="gone"):
        players.queue.take(lambda: None)


def test_groups_whose_rewards_differ_are_told_from_others():
    assert rewards_differ(group(0, 1)) and rewards_differ(group(None, 0, 1))
    assert not any(rewards_differ(one) for one in (group(1, 1), group(None, 1), group(None, None), []))


def test_without_dynamic_sampling_every_group_is_kept():
    players = Players(dynamic=False)
    players.queue.advance(0)
    for serial in (0, 1):
        players.land(serial, group(1, 1))
    assert players.queue.take(lambda: None).serials == [0, 1]
