"""Outcomes that have landed are on the disk, whatever ends the process, and come back by task and sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from gymexp.config.schema import EnvConfig
from gymexp.evaluation.kept import KeptOutcomes
from gymexp.rollout.outcome import (
    Completed,
    Failed,
    Outcome,
    Rollout,
    Task,
    Truncated,
    Turn,
    outcome_from_json,
    outcome_to_json,
)
from gymexp.rollout.rollout_files import RolloutWriter

TASKS = {key: Task(key, "sudoku", "agent", {"question": key}) for key in ("sudoku/v/0", "sudoku/v/1")}
PLACES = [(key, sample) for key in TASKS for sample in range(2)]


def played(key: str, reward: float = 0.1 + 0.2) -> Completed:
    turn = Turn([1, 2], [3], [-0.123456789])
    return Completed(Rollout(TASKS[key], [turn], reward, [{"type": "message"}], seconds={"total": 1.0}))


def failed(key: str) -> Failed:
    return Failed(TASKS[key], "timeout", "late", "a.log", ["timeout"])


def kept(directory: Path) -> KeptOutcomes:
    return KeptOutcomes(directory, "eval-000002", TASKS)


@pytest.mark.parametrize(
    "outcome",
    [
        played("sudoku/v/0"),
        Truncated(played("sudoku/v/0").rollout, "turns", ["engine"]),
        failed("sudoku/v/1"),
    ],
)
def test_an_outcome_reads_back_as_it_was(outcome: Outcome):
    import orjson

    task = outcome.task if isinstance(outcome, Failed) else outcome.rollout.task
    assert outcome_from_json(orjson.loads(orjson.dumps(outcome_to_json(outcome))), task) == outcome


def test_what_was_added_is_there_in_the_next_start_and_failures_are_played_again(tmp_path):
    first = kept(tmp_path)
    assert first.missing(PLACES) == PLACES
    first.add([(PLACES[2], played(PLACES[2][0])), (PLACES[0], failed(PLACES[0][0]))])
    first.add([(PLACES[1], played(PLACES[1][0], 0.5))])
    again = kept(tmp_path)
    assert again.missing(PLACES) == [PLACES[0], PLACES[3]]
    assert again.by_place[PLACES[2]] == played(PLACES[2][0])
    again.add([(PLACES[0], played(PLACES[0][0]))])
    assert kept(tmp_path).missing(PLACES) == [PLACES[3]]


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_frame_that_was_not_written_whole_is_cut_off_and_the_next_one_reads(tmp_path, cut):
    first = kept(tmp_path)
    first.add([(PLACES[0], played(PLACES[0][0]))])
    first.add([(PLACES[1], played(PLACES[1][0]))])
    path = tmp_path / "landing" / "eval-000002.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-cut])
    again = kept(tmp_path)
    assert again.missing(PLACES) == PLACES[1:]
    again.add([(PLACES[3], played(PLACES[3][0]))])
    assert kept(tmp_path).missing(PLACES) == PLACES[1:3]


def test_the_rollouts_of_an_earlier_start_count_by_task_and_sample(tmp_path):
    outcomes = [failed(key) if (key, n) == PLACES[1] else played(key, n / 2) for key, n in PLACES]
    (tmp_path / "rollouts").mkdir()
    RolloutWriter(tmp_path / "rollouts", {"sudoku": EnvConfig()}).write("eval-000002", outcomes, 2)
    again = kept(tmp_path)
    assert again.missing(PLACES) == [PLACES[1]]
    assert again.by_place[PLACES[3]] == outcomes[3]


def test_the_file_and_its_folder_go_once_the_outcomes_are_elsewhere(tmp_path):
    first = kept(tmp_path)
    first.remove()
    first.add([(PLACES[0], played(PLACES[0][0]))])
    first.remove()
    assert not (tmp_path / "landing").exists()
