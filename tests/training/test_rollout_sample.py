"""A tracker gets the rollouts to look at first, with their prompts."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Task, Truncated, Turn, task_of
from gymexp.training.rollout_sample import Chosen, as_text, choose, facts, messages

INPUT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
ITEMS = [
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "easy"}]},
    {"type": "function_call", "name": "add", "arguments": '{"a": 2}'},
    {"type": "function_call_output", "output": "4"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is 4."}]},
]


def outcome(number: int, reward: float | None, env: str = "sudoku") -> Outcome:
    task = Task(f"{env}/{number}", env, "a", {"responses_create_params": {"input": INPUT}})
    if reward is None:
        return Failed(task, "timeout", "too slow")
    return Completed(Rollout(task, [Turn([1], [2, 3], [-0.5, -0.5])], reward, ITEMS))


def test_each_environment_in_turn_gives_its_best_its_worst_a_failed_and_random_ones():
    some = [outcome(n, reward) for n, reward in enumerate([0.5, 1.0, None, 0.0, 0.7])]
    some += [outcome(n, 0.5, "workplace") for n in range(2)]
    advantages = [n / 10 for n in range(len(some))]
    found = choose(some, 6, "step-000001", advantages)
    assert [(one.why, task_of(one.outcome).key) for one in found[:4]] == [
        ("best", "sudoku/1"),
        ("best", "workplace/0"),
        ("worst", "sudoku/3"),
        ("worst", "workplace/1"),
    ]
    assert [one.why for one in found[4:]] == ["failed", "random"]
    assert [one.advantage for one in found[:5]] == [0.1, 0.5, 0.3, 0.6, 0.2]
    assert choose(some, 6, "step-000001", advantages) == found
    assert choose(some, 0, "step-000001") == choose([], 3, "step-000001") == []


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.none() | st.floats(0, 1)), max_size=12), st.integers(0, 14)
)
def test_no_rollout_is_chosen_twice_and_as_many_as_there_are(pairs, limit):
    some = [outcome(number, reward, env) for number, (env, reward) in enumerate(pairs)]
    found = Counter(id(one.outcome) for one in choose(some, limit, "x"))
    assert found.total() == min(limit, len(some)) and set(found.values()) <= {1}


def test_a_conversation_has_the_prompt_the_calls_and_the_answer():
    found = messages(outcome(0, 1.0))
    assert found == [
        *INPUT,
        {"role": "assistant", "content": "easy"},
        {"role": "assistant", "content": 'add({"a": 2})'},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    assert as_text(found[:2]) == "system: Be brief.\n\nuser: 2 + 2?"
    assert messages(outcome(0, None))[2:] == [{"role": "error", "content": "too slow"}]
    plain = Failed(Task("k", "e", "a", {"responses_create_params": {"input": "Hi"}}), "timeout", "slow")
    assert messages(plain)[0] == {"role": "user", "content": "Hi"}


def test_facts_name_how_it_ended():
    done = outcome(0, 1.0)
    assert isinstance(done, Completed)
    expected = {"env": "sudoku", "task": "sudoku/0", "chosen": "best", "reward": 1.0, "turns": 1, "tokens": 2}
    assert facts(Chosen("best", done)) == expected | {"outcome": "completed"}
    assert facts(Chosen("best", Truncated(done.rollout, "length")))["outcome"] == "truncated (length)"
    failed = facts(Chosen("failed", outcome(0, None)))
    assert (failed["outcome"], failed["reward"]) == ("failed (timeout)", None)
    assert failed.keys() == expected.keys() | {"outcome"}, "the columns of one table"
