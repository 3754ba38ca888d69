"""Two ranks play the groups that the first rank's queue hands out, each its part, also after a resume."""

from __future__ import annotations

import json

import pytest
from sharded_ranks import train

STEPS = 5


@pytest.mark.ranks
def test_both_ranks_train_their_part_of_each_batch_of_the_queue_in_order(tmp_path):
    overlap = {"max_staleness": 2, "lead": 2, "order": "exact"}
    for until in (2, STEPS):
        train(tmp_path, until, {"max_steps": STEPS, "save_steps": 2}, tasks=64, overlap=overlap)
    for rank in range(2):
        played = [
            keys
            for until in (2, STEPS)
            for keys in json.loads((tmp_path / f"played-{rank}-{until}.json").read_text())
        ]
        # Eight rollouts a step are two groups of four, one a rank; the first epoch has the tasks in order.
        assert played == [[f"t{2 * step + rank}"] * 4 for step in range(STEPS)]
