"""The hf engine samples over updates of its weights: each token is of the weights that the gateway says, and
the pieces of a turn are drawn independently."""

from __future__ import annotations

import copy

import pytest
from conversing import TOKENIZER, build_model
from loopback import serving
from updated_policy import check, repeats_of_pieces, sample_over_updates, versions_of

from gymexp.engine.hf.engine import HFEngine
from gymexp.engine.hf.replica import Weights
from gymexp.engine.hf.server import build_app


@pytest.fixture(scope="module")
def models():
    return versions_of(build_model(), 3)


@pytest.fixture
def sampled(models, tmp_path):
    def sample():
        model = copy.deepcopy(models[0])
        engine = HFEngine(model, eos_token_ids=[], pad_token_id=0, tokenizer=TOKENIZER)
        app = build_app(engine)
        app.add_routes(Weights(model, engine).routes())
        try:
            with serving(app) as url:
                return sample_over_updates(url, models, tmp_path, lambda: int(engine.stats()["tokens"]), 60)
        finally:
            engine.close()

    return sample


def test_each_token_is_of_the_weights_that_the_gateway_says_and_pieces_are_drawn_anew(models, sampled):
    turns = sampled()
    check(models, turns, 1e-4)
    repeats = repeats_of_pieces(models, turns)
    assert repeats.variance > 5 and abs(repeats.z) < 4, repeats


def test_a_seed_that_pieces_share_would_show(models, sampled, monkeypatch):
    monkeypatch.setattr("gymexp.gateway.pieces.piece_seed", lambda seed, num_done: seed)
    repeats = repeats_of_pieces(models, sampled())
    assert repeats.z > 10, repeats
