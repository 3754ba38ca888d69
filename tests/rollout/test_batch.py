"""What TRL is given: one entry a rollout, lists of equal length, and no reward where there is none."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gymexp.rollout.batch import build_batch
from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Task, Truncated, Turn

TASK = Task("e/train/000001", "e", "a", {})
PAD = 7
ids = st.lists(st.integers(0, 99), max_size=5)


@st.composite
def turns(draw) -> list[Turn]:
    """Verified turns: every prompt starts with the turn before it."""
    made: list[Turn] = []
    history = draw(ids)
    for _ in range(draw(st.integers(1, 4))):
        sampled = draw(st.lists(st.integers(0, 99), min_size=1, max_size=5))
        logprobs = [-draw(st.floats(0, 20)) - 0.001 for _ in sampled]
        made.append(Turn(history, sampled, logprobs))
        history = history + sampled + draw(ids)
    return made


@st.composite
def outcomes(draw) -> Outcome:
    kind = draw(st.sampled_from([Completed, Truncated, Failed]))
    if kind is Failed:
        return Failed(TASK, "engine", "gone")
    rollout = Rollout(TASK, draw(turns()), draw(st.floats(-1, 1)), [])
    return Completed(rollout) if kind is Completed else Truncated(rollout, "length")


@given(st.lists(outcomes(), max_size=6), st.booleans())
def test_a_batch_has_one_entry_an_outcome_with_everything_of_equal_length(some, mask_truncated):
    batch = build_batch(some, placeholder_id=PAD, mask_truncated=mask_truncated)
    assert len(batch.prompt_ids) == len(batch.completion_ids) == len(batch.rewards) == len(some)
    for completion, mask, logprobs in zip(batch.completion_ids, batch.env_mask, batch.logprobs, strict=True):
        assert len(completion) == len(mask) == len(logprobs) > 0
        assert all(
            logprob == 0.0 for logprob, sampled in zip(logprobs, mask, strict=True) if not sampled
        ) or (mask_truncated)


@given(turns(), st.floats(-1, 1))
def test_exactly_what_the_policy_sampled_is_trained_on(some, reward):
    [[prompt], [completion], [mask], [logprobs], [scored]] = vars(
        build_batch([Completed(Rollout(TASK, some, reward, []))], placeholder_id=PAD, mask_truncated=True)
    ).values()
    assert prompt == some[0].prompt_ids
    assert prompt + completion == some[-1].prompt_ids + some[-1].completion_ids
    assert [i for i, m in zip(completion, mask, strict=True) if m] == [
        i for t in some for i in t.completion_ids
    ]
    assert [p for p, m in zip(logprobs, mask, strict=True) if m] == [p for t in some for p in t.logprobs]
    assert scored == reward


def test_a_failure_is_one_masked_placeholder_without_a_reward():
    batch = build_batch([Failed(TASK, "timeout", "slow")], placeholder_id=PAD, mask_truncated=False)
    assert (batch.prompt_ids, batch.completion_ids) == ([[PAD]], [[PAD]])
    assert (batch.env_mask, batch.logprobs, batch.rewards) == ([[0]], [[0.0]], [None])


def test_a_truncated_rollout_keeps_its_reward_and_loses_its_gradient_only_where_asked():
    cut = Truncated(Rollout(TASK, [Turn([1], [2, 3], [-0.1, -0.2])], 0.5, []), "turns")
    done = Completed(cut.rollout)
    scored = build_batch([cut, done], placeholder_id=PAD, mask_truncated=False)
    masked = build_batch([cut, done], placeholder_id=PAD, mask_truncated=True)
    assert scored.env_mask == [[1, 1], [1, 1]]
    assert masked.env_mask == [[0, 0], [1, 1]]
    assert scored.rewards == masked.rewards == [0.5, 0.5]
