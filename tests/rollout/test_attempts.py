"""The gateway's memory of attempts is bounded, adds up seconds, and has the versions of each turn."""

from __future__ import annotations

from gymexp.rollout.attempts import Attempts


def test_seconds_add_up_and_each_turn_has_its_versions():
    attempts = Attempts()
    attempts.add_turn("a", 1.0, "first", [(5, 2)])
    attempts.add_turn("a", 0.5, "second", [(5, 1), (7, 3)])
    attempts.add_turn("a", 0.25, "third", None)
    attempts.add_turn("silent", 2.0)
    assert attempts.answer(["a", "silent", "unknown"]) == {
        "attempts": [
            {"versions": {"first": [(5, 2)], "second": [(5, 1), (7, 3)]}, "seconds": 1.75, "usage": None},
            {"versions": {}, "seconds": 2.0, "usage": None},
            None,
        ]
    }


def test_of_turns_with_equal_ids_the_older_weights_count():
    attempts = Attempts()
    for spans in ([(6, 3)], [(5, 1), (6, 2)], [(7, 3)]):
        attempts.add_turn("a", 1.0, "same", spans)
    assert attempts.answer(["a"])["attempts"][0]["versions"] == {"same": [(5, 1), (6, 2)]}


def test_the_attempt_without_a_turn_for_the_longest_time_is_forgotten_first():
    attempts = Attempts(capacity=3)
    for name in ("a", "b", "a", "c"):
        attempts.add_turn(name, 1.0, name, [(1, 1)])
    assert [one and one["seconds"] for one in attempts.answer(["a", "b", "c"])["attempts"]] == [
        2.0,
        None,
        1.0,
    ]


def test_a_long_attempt_makes_room_by_the_number_of_its_turns():
    attempts = Attempts(capacity=4)
    for name in ("a", "b", "b", "b", "c"):
        attempts.add_turn(name, 1.0)
    known = lambda: [one is not None for one in attempts.answer(["a", "b", "c"])["attempts"]]  # noqa: E731
    assert known() == [False, True, True]
    attempts.add_turn("c", 1.0)
    assert known() == [False, False, True], "all three turns of b are forgotten at once"
    for _ in range(9):
        attempts.add_turn("c", 1.0)
    assert known() == [False, False, True], "the newest attempt is kept, however long it is"


def test_the_tokens_of_an_endpoints_turns_add_up_and_a_count_that_one_turn_lacks_is_left_out():
    attempts = Attempts()
    for usage in ({"turns": 1, "prompt_tokens": 5, "completion_tokens": 0}, {"turns": 1, "prompt_tokens": 9}):
        attempts.add_turn("a", 1.0, usage=usage)
    assert attempts.answer(["a"])["attempts"][0]["usage"] == {"turns": 2, "prompt_tokens": 14}
