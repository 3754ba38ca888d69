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
    for until in (2, STEPS):
        checked = [json.loads((tmp_path / f"checked-{rank}-{until}.json").read_text()) for rank in range(2)]
        rows = [one["rows"] for one in checked]
        assert [len(of_rank) for of_rank in rows] == [1, 1], "due at a process's first step, and done once"
        assert [len(of_rank[0]) for of_rank in rows] == [8, 8]
        tokens = {tuple(ids) for of_rank in rows for ids in of_rank[0]}
        assert len(tokens) == 16, "each rank has its own part of what landed on the first one"
        drifts = checked[0]["drifts"]  # a resumed process has those before it too
        assert len(drifts) == (1 if until == 2 else 2) and max(drifts) < 1e-6
