"""What the controller tells the trainer is what the trainer reads."""

from __future__ import annotations

import json

import pytest

from gymexp.record.services_file import Replica, Services

REPLICA = Replica("maze", "maze_agent", "http://a", ["maze-agent-0", "maze-server-0"], ["maze-server-0"], 3)


@pytest.mark.parametrize(
    "told",
    [
        Services("http://c", ["http://g"], {"maze": [REPLICA]}, "hf", None, engine_fd=7),
        Services(
            "http://c", ["http://g"], {}, "vllm", "checkpoint-4", None, ["http://e"], "nccl", True, "10.0.0.7"
        ),
    ],
)
def test_what_was_told_is_read(told, tmp_path):
    told.write(tmp_path)
    assert Services.read(tmp_path) == told


def test_a_field_that_nobody_knows_is_not_passed_over(tmp_path):
    Services("http://c", ["http://g"], {}, "hf", None).write(tmp_path)
    path = tmp_path / "services.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"more": 1}))
    with pytest.raises(TypeError, match="more"):
        Services.read(tmp_path)
