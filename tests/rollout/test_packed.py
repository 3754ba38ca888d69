"""What a rank needs of its rollouts survives the way to it, exactly; what only readers need stays behind."""

from __future__ import annotations

import pickle
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Task, Truncated, Turn
from gymexp.rollout.packed import pack, unpack

ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)


@st.composite
def turns(draw) -> list[Turn]:
    """Verified turns: each prompt continues the turn before."""
    made: list[Turn] = []
    prompt = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5))
    for _ in range(draw(st.integers(1, 4))):
        sampled = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5))
        logprobs = draw(st.lists(st.floats(-50, 0), min_size=len(sampled), max_size=len(sampled)))
        cut = draw(st.integers(0, len(sampled)))
        spans = draw(st.sampled_from([[], [(7, len(sampled))], [(7, cut), (8, len(sampled) - cut)]]))
        made.append(Turn(prompt, sampled, logprobs, spans))
        prompt = prompt + sampled + draw(ids)
    return made


@st.composite
def outcomes(draw) -> Outcome:
    task = Task(f"e/train/{draw(st.integers(0, 9))}", "e", "a", {})
    kind = draw(st.sampled_from([Completed, Truncated, Failed]))
    if kind is Failed:
        return Failed(task, draw(st.sampled_from(["engine", "timeout"])), "")
    version = draw(st.none() | st.integers(0, 9))
    rollout = Rollout(task, draw(turns()), draw(st.floats(-1, 1)), [], version)
    if kind is Completed:
        return Completed(rollout)
    return Truncated(rollout, draw(st.sampled_from(["length", "turns"])))


@given(st.lists(outcomes(), max_size=5))
def test_what_is_packed_comes_back_as_it_was(some):
    assert unpack(pickle.loads(pickle.dumps(pack(some)))) == some


@given(outcomes())
def test_what_only_readers_need_is_left_behind(bare):
    text = "only for readers"
    if isinstance(bare, Failed):
        full = replace(bare, detail=text, log=text, task=replace(bare.task, row={"text": text}))
    else:
        rollout = replace(bare.rollout, items=[{"content": text}], verdict={"why": text}, replica=text)
        rollout = replace(rollout, task=replace(rollout.task, row={"text": text}), seconds={text: 1.0})
        full = replace(bare, rollout=rollout, failures=["timeout"])
    data = pickle.dumps(pack([full]))
    assert text.encode() not in data
    assert unpack(pickle.loads(data)) == [bare]


def test_a_token_travels_once_however_many_turns_have_it_in_their_prompt():
    prompt, made = list(range(1000)), []
    for number in range(5):
        made.append(Turn(prompt, [number], [-0.5]))
        prompt = [*prompt, number, 7]
    data = pickle.dumps(pack([Completed(Rollout(Task("k", "e", "a", {}), made, 1.0, []))]))
    num_tokens = 1000 + 5 + 4
    assert len(data) < 4 * num_tokens + 8 * 5 + 400
