"""The gateway's memory of attempts is bounded, adds up seconds, and spans the versions of all turns."""

from __future__ import annotations

from gymexp.rollout.attempts import Attempts


def test_seconds_add_up_and_versions_span_the_turns():
    attempts = Attempts()
    for versions, seconds in (((5, 5), 1.0), ((3, 4), 0.5), (None, 0.25)):
        attempts.add_turn("a", versions, seconds)
    attempts.add_turn("silent", None, 2.0)
    assert attempts.answer(["a", "silent", "unknown"]) == {
        "attempts": [
            {"versions": (3, 5), "seconds": 1.75, "usage": None},
            {"versions": None, "seconds": 2.0, "usage": None},
            None,
        ]
    }


def test_the_attempt_without_a_turn_for_the_longest_time_is_forgotten_first():
    attempts = Attempts(capacity=2)
    for name in ("a", "b", "a", "c"):
        attempts.add_turn(name, (1, 1), 1.0)
    assert [one and one["seconds"] for one in attempts.answer(["a", "b", "c"])["attempts"]] == [
        2.0,
        None,
        1.0,
    ]


def test_the_tokens_of_an_endpoints_turns_add_up_and_a_count_that_one_turn_lacks_is_left_out():
    attempts = Attempts()
    for usage in ({"turns": 1, "prompt_tokens": 5, "completion_tokens": 0}, {"turns": 1, "prompt_tokens": 9}):
        attempts.add_turn("a", None, 1.0, usage)
    assert attempts.answer(["a"])["attempts"][0]["usage"] == {"turns": 2, "prompt_tokens": 14}
