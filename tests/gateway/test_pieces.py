"""A generation in pieces is the one that an engine samples whole, but for its seeds."""

from __future__ import annotations

import json
import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gymexp.gateway.pieces import Pieces, first_tokens, joined
from gymexp.rollout.draws import piece_seed
from gymexp.rollout.generation import Generation

PROMPT = [1, 2, 3]
SPANS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=5)


def cut(ids: list[int], version: int = 0, reason: str = "abort") -> Generation:
    return Generation(ids, [-0.5] * len(ids), reason, [(version, len(ids))])  # pyright: ignore[reportArgumentType]


def sent(pieces: Pieces) -> tuple[list[int], dict]:
    body = json.loads(pieces.payload())
    return body["token_ids"], body["sampling_params"]


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 30), st.integers(0, 2**31 - 1))
def test_pieces_join_to_one_generation_within_its_limit(sizes, limit, seed):
    """The engine: counts up, and is cut after as many tokens as each size says."""
    pieces = Pieces(PROMPT, {"max_tokens": limit, "seed": seed, "temperature": 0.5})
    seeds = {}
    for version, size in enumerate([*sizes, limit]):
        ids, params = sent(pieces)
        done = len(ids) - len(PROMPT)
        assert ids == PROMPT + list(range(done)) and params["temperature"] == 0.5
        assert params["max_tokens"] == limit - done > 0
        assert params["seed"] == piece_seed(seed, done)
        seeds[done] = params["seed"]
        count = min(size, params["max_tokens"])
        reason = "length" if size >= params["max_tokens"] and version % 2 else "abort"
        pieces.add(cut(list(range(done, done + count)), version, reason))
        if pieces.is_finished:
            break
    whole = pieces.whole()
    assert (whole.token_ids, whole.finish_reason) == (list(range(limit)), "length")
    assert len(whole.logprobs) == limit and whole.versions is not None
    assert sum(count for _, count in whole.versions) == limit
    assert [version for version, _ in whole.versions] == sorted({version for version, _ in whole.versions})
    assert seeds[0] == seed and len(set(seeds.values())) == len(seeds)


def test_the_last_token_ends_a_generation_though_the_cut_was_faster():
    pieces = Pieces(PROMPT, {"max_tokens": 9, "stop_token_ids": [7]})
    pieces.add(cut([7, 5]))
    assert not pieces.is_finished, "only the last token ends it"
    pieces.add(cut([7], 1))
    assert (pieces.finish_reason, pieces.whole().token_ids) == ("stop", [7, 5, 7])
    full = Pieces(PROMPT, {"max_tokens": 2})
    full.add(cut([7, 5]))
    assert full.finish_reason == "length"


def test_a_piece_of_unknown_weights_makes_those_of_all_unknown_unless_it_is_empty():
    pieces = Pieces(PROMPT, {"max_tokens": 9})
    pieces.add(Generation([], [], "abort", None))
    pieces.add(cut([4], 2))
    assert pieces.whole().versions == [(2, 1)]
    pieces.add(Generation([5], [-0.5], "stop", None))
    assert pieces.whole().versions is None and pieces.whole().finish_reason == "stop"


def letters(ids: list[int]) -> str:
    return "".join(map(chr, ids))


@given(
    st.text("ab", min_size=1, max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=2),
    st.integers(0, 2**32),
)
def test_a_stop_string_ends_a_generation_wherever_it_was_cut(text, stops, seed):
    """The engine ends at a stop string that lies within a piece, and does not see one that begins before."""
    rng = random.Random(seed)
    end = min((at + len(stop) for stop in stops if (at := text.find(stop)) >= 0), default=len(text))
    pieces = Pieces(PROMPT, {"max_tokens": len(text), "stop": stops}, letters)
    while not pieces.is_finished:
        ids, _ = sent(pieces)
        done = len(ids) - len(PROMPT)
        piece = text[done : done + rng.randint(0, 6)]
        seen = min((at + len(stop) for stop in stops if (at := piece.find(stop)) >= 0), default=None)
        piece, reason = (piece[:seen], rng.choice(("stop", "abort"))) if seen else (piece, "abort")
        if not seen and done + len(piece) == len(text):
            reason = "length"
        pieces.add(cut([ord(letter) for letter in piece], 0, reason))
    whole = pieces.whole()
    assert letters(whole.token_ids) == text[:end]
    assert len(whole.logprobs) == end and whole.versions == [(0, end)]
    is_stopped = any(stop in text for stop in stops)
    assert whole.finish_reason == ("stop" if is_stopped else "length")


@given(SPANS, SPANS, st.integers(0, 20))
def test_versions_stay_those_of_each_token(first, second, num_tokens):
    def expand(spans):
        return [version for version, count in spans for _ in range(count)]

    both = joined(first, second)
    assert expand(both) == expand(first) + expand(second)
    assert all(a != b for (a, _), (b, _) in pairwise(both))
    kept = first_tokens(both, num_tokens)
    assert expand(kept) == expand(both)[:num_tokens] and all(count > 0 for _, count in kept)
    assert joined(None, second) is None and joined(first, None) is None
