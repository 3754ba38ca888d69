"""What a run directory says of its run: how it ended is a field that the run's own processes wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gymexp.processes import clock
from gymexp.record.directory import failure_of
from gymexp.record.run_state import read_run

GONE = {"pid": 2**22 + 1, "began": 1.0}
TEXT = "ended by SIGTERM after step 2; go on with: …"
STOPPED = {"step": 2, "stopped": True, "held_out": {}}
TRAINED = {"step": 4, "stopped": False, "held_out": {}}


def state(path: Path, status: dict, result: dict | None = None) -> tuple[str, str]:
    (path / "status.json").write_text(json.dumps(status))
    if result:
        (path / "result.json").write_text(json.dumps(result))
    run = read_run(path)
    return run.state, run.why


@pytest.mark.parametrize(
    ("status", "result", "told"),
    [
        ({"ended": "finished", "outcome": "finished"}, TRAINED, ("finished", "")),
        ({"ended": "stopped", "outcome": TEXT}, STOPPED, ("stopped", TEXT)),
        ({"ended": "stopped", "outcome": "by whatever words"}, None, ("stopped", "by whatever words")),
        ({"ended": "failed", "outcome": TEXT}, None, ("failed", TEXT)),
        ({"ended": "failed", "outcome": "why\nmore"}, {"error": "why\nmore"}, ("failed", "why")),
        ({"ended": "requeued", "outcome": "requeued"}, None, ("waiting", "requeued")),
        ({"ended": "finished", "outcome": "finished"}, None, ("finished", "its result.json is damaged")),
        ({"outcome": TEXT}, STOPPED, ("stopped", TEXT)),
        ({"ended": None}, None, ("lost", f"its process ({GONE['pid']}) is gone and recorded no end")),
    ],
)
def test_a_run_is_judged_by_what_it_wrote_and_not_by_words(status, result, told, tmp_path):
    assert state(tmp_path, GONE | status, result) == told


def test_a_run_that_goes_on_is_running_whatever_an_earlier_start_left(tmp_path):
    assert os.getpid() == clock.this_process()["pid"]
    assert state(tmp_path, clock.this_process() | {"ended": None}, STOPPED) == ("running", "")


@pytest.mark.parametrize(
    ("result", "failure"),
    [(TRAINED, None), ({"error": "why"}, "why"), (STOPPED, "no result"), ({}, "no result")],
)
def test_one_judge_says_whether_a_run_came_to_a_good_end(result, failure):
    assert failure_of(result, "no result") == failure


def test_a_lost_evaluation_is_explained_by_its_evaluators_log(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "status.json").write_text(json.dumps(GONE))
    assert read_run(tmp_path).log is None
    (tmp_path / "logs" / "evaluator.log").touch()
    assert read_run(tmp_path).log == tmp_path / "logs" / "evaluator.log"
