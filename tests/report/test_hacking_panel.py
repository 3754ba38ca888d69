"""The signs of a gamed reward: rollouts by length, diversity of a group, and what the verifiers answered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import make_run, write_lines

from gymexp.report.hacking_panel import hacking_panel
from gymexp.report.page import run_page
from gymexp.report.panel import Panel
from gymexp.report.run_records import read_records

OLDER_RUN = Path(__file__).parents[1] / "rollout" / "older_run"  # of before the index


def panel_of(path: Path, change: Callable[[dict], dict]) -> Panel:
    """The panel of a run of three steps whose lines of the index are changed."""
    index = make_run(path, steps=3).joinpath("rollouts", "index.jsonl")
    rows = [change(json.loads(line)) for line in index.read_text().splitlines()]
    write_lines(index, rows)
    return hacking_panel(read_records(path))


def of_sudoku(row: dict) -> dict:
    """Every fourth rollout is of another kind. The answers differ, and the name of the task never does."""
    if row["env"] != "sudoku":
        return row | {"verdict": {}}
    is_odd = row["number"] % 4 == 0
    verdict = {"is_correct": not is_odd, "score": 0.5, "label": "no tool" if is_odd else "right"}
    return row | {
        "reward": 0.0 if is_odd else 1.0,
        "verdict": verdict | {"answer": str(row["number"]), "task": "mini_sudoku"},
    }


def test_the_verifiers_fields_are_counted_with_the_reward_of_their_rollouts(tmp_path):
    panel = panel_of(tmp_path / "run", of_sudoku)
    [table] = panel.tables
    assert table.head[1] == "field of the verifier, steps 1 to 3"
    assert [list(row[1:]) for row in table.rows] == [
        ["is_correct", "True", "0.750", "1.000"],
        ["is_correct", "False", "0.250", "0.000"],
        ["score", "mean 0.5", "1.000", "–"],
        ["label", "right", "0.750", "1.000"],
        ["label", "no tool", "0.250", "0.000"],
    ]
    titles = [chart.title for chart in panel.charts]
    assert titles[2:] == ["sudoku: share with is_correct", "sudoku: score, mean"]
    assert panel.charts[2].figures[""]["data"][0]["y"] == [0.75] * 3
    assert panel.notes == ["The verifier of workplace says no yes or no, number or word beside the reward."]


def test_runs_of_before_the_fields_were_kept_say_so(tmp_path):
    panel = panel_of(tmp_path / "run", lambda row: row)
    assert not panel.tables and len(panel.charts) == 2
    assert all("made before gymexp kept them" in note for note in panel.notes) and len(panel.notes) == 2


@pytest.mark.parametrize(("answers", "share"), [(1, 1 / 8), (4, 4 / 8), (8, 1.0)])
def test_diversity_is_the_share_of_distinct_answers_in_a_group_of_eight(tmp_path, answers, share):
    panel = panel_of(tmp_path / "run", lambda row: row | {"text": str(row["number"] % answers)})
    assert panel.charts[1].figures[""]["data"][0]["y"] == pytest.approx([share] * 3)


def test_a_run_of_before_the_index_has_the_panels_of_its_rollouts(tmp_path):
    """The lines of its index are made from its files of rollouts."""
    run = tmp_path / "run"
    shutil.copytree(OLDER_RUN, run)
    records = read_records(run)
    assert sorted(records.rows_of_step) == [1, 2] and sorted(records.rows_of_evaluation) == [0]
    panel = hacking_panel(records)
    lengths = [len(trace["x"]) for trace in panel.charts[0].figures[""]["data"]]
    assert sum(lengths) == len([row for row in records.rows if row["file"].startswith("step-")])
    assert "rollouts of steps 1 to 2" in run_page(records)
