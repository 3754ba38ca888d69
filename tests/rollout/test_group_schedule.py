"""Groups are played ahead of training within bounds, each once, and none is lost for being slow."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from gymexp.rollout.group_schedule import GroupSchedule

MANY = settings(max_examples=500, deadline=None)


@dataclass
class History:
    """A run with a scripted clock: groups land in any order, some are left out, and it may be resumed."""

    size: int
    lead: int
    bound: int
    order: str
    num_batches: int
    seed: int
    flat: float = 0.0  # share of the groups that are left out
    started: list[int] = field(default_factory=list)  # since the last resume
    starts: dict[int, int] = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.schedule = self.new()

    def new(self) -> GroupSchedule:
        return GroupSchedule(self.size, self.lead, self.bound, self.order, self.num_batches)  # type: ignore[arg-type]

    @property
    def version(self) -> int:
        return self.schedule.version

    @property
    def outstanding(self) -> set[int]:
        return set(self.starts)

    def start(self) -> list[int]:
        serials = self.schedule.to_start()
        for serial in serials:
            assert serial not in self.starts and serial not in self.done()
            self.starts[serial] = self.version
        self.started += serials
        # Statement 4: never more than k batches beyond the one that is played or trained.
        played = len(self.starts) + sum(map(len, self.batches))
        assert played <= (self.version + 1 + self.bound) * self.size
        assert played <= self.num_batches * self.size
        return serials

    @property
    def trained(self) -> list[int]:
        return [serial for batch in self.batches for serial in batch]

    def done(self) -> set[int]:
        return {*self.left_out, *self.trained}

    def is_flat(self, serial: int) -> bool:
        return random.Random(f"{self.seed}/{serial}").random() < self.flat

    def land(self, serial: int) -> None:
        self.in_flight.remove(serial)
        self.schedule.landed(serial, is_kept=not self.is_flat(serial))
        if self.is_flat(serial):
            self.left_out.append(serial)
            del self.starts[serial]
        self.fly()

    def fly(self) -> None:
        self.in_flight += self.start()

    def play(self, until: int | None = None, slowest: int | None = None) -> None:
        """Trains batches up to `until`. slowest: a serial that lands only when nothing else can."""
        self.in_flight: list[int] = []
        self.fly()
        while len(self.batches) < (self.num_batches if until is None else until):
            self.wait_for_batch(slowest)
            for _ in range(self.random.randrange(4)):  # during the update
                if quick := [one for one in self.in_flight if one != slowest]:
                    self.land(self.random.choice(quick))
            self.schedule.advance(len(self.batches))
            self.fly()

    def wait_for_batch(self, slowest: int | None) -> None:
        while (batch := self.schedule.take()) is None:
            assert self.in_flight, "nothing can land any more, and there is no batch"
            # Often the newest lands first, so that old ones are overtaken.
            quick = [one for one in self.in_flight if one != slowest] or self.in_flight
            self.land(quick[-1] if self.random.random() < 0.7 else self.random.choice(quick))
        assert len(set(batch)) == self.size
        self.ages += [self.version - self.starts.pop(serial) for serial in batch]
        self.batches.append(batch)

    def resume(self, state: dict) -> None:
        self.starts, self.started, self.in_flight = {}, [], []
        self.schedule = self.new()
        self.schedule.restore(state, len(self.batches))


@st.composite
def histories(draw: st.DrawFn, order: str | None = None, flat: bool = True, bound: int = 6) -> History:
    bound = draw(st.integers(0, bound))
    order = order or draw(st.sampled_from(("exact", "finished")))
    return History(
        size=draw(st.integers(1, 5)),
        lead=bound if order == "exact" else draw(st.integers(0, bound)),
        bound=bound,
        order=order,
        num_batches=draw(st.integers(1, 12)),
        seed=draw(st.integers(0, 2**32)),
        flat=draw(st.sampled_from((0.0, 0.0, 0.3, 0.8))) if flat else 0.0,
    )


@MANY
@given(histories())
def test_no_group_is_trained_beyond_the_bound_and_each_that_was_started_is_trained_or_left_out_once(history):
    history.play()
    assert max(history.ages) <= history.bound
    assert Counter(history.started) == Counter([*history.trained, *history.left_out])
    assert max(Counter(history.started).values()) == 1
    assert [len(batch) for batch in history.batches] == [history.size] * history.num_batches
    assert not history.outstanding


@MANY
@given(histories(order="exact"))
def test_in_exact_order_the_batches_are_the_serials_in_order_without_those_left_out(history):
    history.play()
    trained = history.trained
    assert trained == [serial for serial in range(max(trained) + 1) if not history.is_flat(serial)]


@MANY
@given(histories(bound=0))
def test_in_turn_nothing_is_started_that_the_batch_of_the_same_version_does_not_train(history):
    history.play()
    trained_in = {serial: number for number, batch in enumerate(history.batches) for serial in batch}
    assert set(history.ages) == {0} and len(trained_in) == history.num_batches * history.size
    if not history.flat:
        assert history.trained == list(range(len(trained_in)))


@MANY
@given(histories(order="finished", flat=False), st.integers(0, 30))
def test_the_slowest_group_is_trained_as_well_and_the_state_stays_small(history, slowest):
    sizes = []
    take = history.schedule.take

    def noting_the_state():
        sizes.append(len(history.schedule.state()["above"]))
        return take()

    history.schedule.take = noting_the_state  # type: ignore[method-assign]
    history.play(slowest=slowest)
    trained = set(history.trained)
    assert trained == set(range(history.num_batches * history.size)), "no choice by duration"
    assert max(sizes) <= (history.bound + 1) * history.size


@MANY
@given(histories(), st.data())
def test_a_resumed_run_trains_the_groups_that_are_left_each_once(history, data):
    until = data.draw(st.integers(0, history.num_batches))
    history.play(until)
    state, done = history.schedule.state(), history.done()
    whole = History(**{name: getattr(history, name) for name in list(history.__dataclass_fields__)[:7]})
    history.resume(state)
    history.play()
    again = [serial for batch in history.batches[until:] for serial in batch]
    assert not done & set(history.started), "no group that is done is played again"
    assert max(history.ages) <= history.bound
    trained = history.trained
    assert len(set(trained)) == len(trained) == history.num_batches * history.size
    whole.play()
    if history.order == "exact":
        assert again == [serial for batch in whole.batches[until:] for serial in batch]
    elif not history.flat:
        assert set(trained) == set(whole.trained)


@MANY
@given(histories(order="finished"))
def test_a_batch_is_the_oldest_that_have_landed_and_says_how_many_overtook(history):
    take, seen = history.schedule.take, []

    def checked():
        landed = sorted(
            (s for s in history.starts if s not in history.in_flight), key=lambda s: (history.starts[s], s)
        )
        batch = take()
        if batch is not None:
            assert batch == landed[: history.size]
            left = set(history.starts) - set(batch)
            seen.append(history.schedule.num_overtaken(batch) == sum(s > min(left, default=s) for s in batch))
        return batch

    history.schedule.take = checked  # type: ignore[method-assign]
    history.play()
    assert len(seen) == history.num_batches and all(seen)


def test_stragglers_do_not_hold_the_lead_back_and_are_waited_for_at_the_bound():
    schedule = GroupSchedule(2, lead=1, max_staleness=3, order="finished", num_batches=9)
    assert schedule.to_start() == [0, 1, 2, 3]
    assert (schedule.num_in_flight, schedule.num_landed) == (4, 0)
    for serial in (1, 2, 3):
        schedule.landed(serial, is_kept=True)
    assert (schedule.num_in_flight, schedule.num_landed) == (1, 3)
    assert schedule.take() == [1, 2] and schedule.has_taken
    assert schedule.to_start() == [] and schedule.num_overtaken([1, 2]) == 2
    for version, batch in ((1, [3, 4]), (2, [5, 6])):
        schedule.advance(version)
        for serial in schedule.to_start():
            schedule.landed(serial, is_kept=True)
        assert schedule.take() == batch
    schedule.advance(3)
    # Group 0 is late, so one more than lead + 1 batches may be outstanding: 0 itself, 7 and 8, then 9 and 10.
    assert schedule.to_start() == [9, 10]
    assert schedule.take() is None, "group 0 would be older than three steps"
    schedule.landed(0, is_kept=True)
    assert schedule.take() == [0, 7]


def test_a_state_names_what_is_done_beyond_the_first_gap():
    schedule = GroupSchedule(2, lead=2, max_staleness=4, order="finished", num_batches=9)
    schedule.to_start()
    schedule.landed(0, is_kept=False)
    for serial in (2, 3):
        schedule.landed(serial, is_kept=True)
    assert schedule.take() == [2, 3]
    state = schedule.state()
    assert state == {"low": 1, "above": [[2, 2]]}
    again = GroupSchedule(2, lead=2, max_staleness=4, order="finished", num_batches=9)
    again.restore(state, 1)
    assert again.to_start() == [1, 4, 5, 6, 7, 8] and again.state() == state


def test_after_a_resume_a_group_beyond_a_gap_that_is_done_is_not_played_again():
    schedule = GroupSchedule(1, lead=0, max_staleness=1, order="finished", num_batches=9)
    schedule.restore({"low": 1, "above": [[2, 1]]}, 1)
    assert schedule.to_start() == [1]
    schedule.landed(1, is_kept=False)
    assert schedule.to_start() == [3]
