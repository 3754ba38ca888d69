"""Two ranks play the tasks that a curriculum draws, each its part of every batch, also after a resume."""

from __future__ import annotations

import json

import pytest
from sharded_ranks import train

from gymexp.data.curriculum import Curriculum
from gymexp.data.weights import Weights

STEPS, TASKS = 6, 5


@pytest.mark.ranks
def test_both_ranks_play_their_part_of_the_draws_that_follow_from_the_rewards_of_both(tmp_path):
    options = {"tasks": TASKS, "sampling": "difficulty"}
    for until in (3, STEPS):
        train(tmp_path, until, {"max_steps": STEPS, "save_steps": 3}, **options)
    ranks = [
        [
            keys
            for until in (3, STEPS)
            for keys in json.loads((tmp_path / f"played-{rank}-{until}.json").read_text())
        ]
        for rank in range(2)
    ]
    drawn = Curriculum({"e": [f"t{n}" for n in range(TASKS)]}, Weights({"e": 1}), 0, True)
    for step in range(STEPS):
        batch = drawn.draw(step, 2)  # of eight rollouts; a rank has one group of four
        assert [ranks[rank][step] for rank in range(2)] == [[key] * 4 for key in batch]
        drawn.learn([int(key[1:]) % 2 == 0 for key in batch])
    assert drawn.metrics(STEPS)["e"]["resting"] > 0
