"""The map of tasks: always solved at the top, never at the bottom, and each cell knows its group."""

from __future__ import annotations

import json

from viewed_runs import ENVS, EVIL, OBEYED, played, served

from gymexp.rollout.outcome import Completed, Failed, Task
from gymexp.rollout.rollout_files import RolloutWriter
from gymexp.view.run_files import RunFiles
from gymexp.view.run_index import RunIndex
from gymexp.view.tables import task_rows
from gymexp.view.task_map import task_map


def written(path, steps: dict[str, dict[str, list[float]]], group: int = 2) -> RunIndex:
    """A run with these rewards by file and by task."""
    writer = RolloutWriter(path / "rollouts", ENVS)
    for file, tasks in steps.items():
        outcomes = [Completed(played(key, reward)) for key, rewards in tasks.items() for reward in rewards]
        writer.write(file, outcomes, group)
    index = RunIndex(RunFiles(path))
    index.refresh()
    return index


def trace_of(index: RunIndex, split: str = "train", number: int = 0) -> dict:
    chart = task_map(task_rows(index, split, ""), split).charts[number]
    return chart.figures[""]["data"][0]


def test_tasks_are_sorted_from_always_to_never_and_cells_have_the_solved_share(tmp_path):
    steps = {
        "step-000001": {"sudoku/train/never": [0, 0.5], "sudoku/train/always": [1, 1]},
        "step-000003": {"sudoku/train/never": [0, 0], "sudoku/train/often": [1, 1]},
        "step-000010": {"sudoku/train/often": [0, 1]},
    }
    trace = trace_of(written(tmp_path, steps))
    # plotly draws the first row at the bottom
    assert trace["y"] == ["3. sudoku/train/never", "2. sudoku/train/often", "1. sudoku/train/always"]
    assert trace["x"] == ["1", "3", "10"]
    assert trace["z"] == [[0, 0, None], [None, 1, 0.5], [1, None, None]]
    assert trace["text"][1] == [None, "2 of 2", "1 of 2"]
    assert trace["customdata"] == [
        ["step-000001/0", "step-000003/0", None],
        [None, "step-000003/1", "step-000010/0"],
        ["step-000001/1", None, None],
    ]


def test_each_environment_has_its_map_and_held_out_tasks_have_theirs(tmp_path):
    steps = {
        "eval-000000": {"sudoku/validation/1": [0], "office/validation/1": [1]},
        "eval-000004": {"sudoku/validation/1": [1], "office/validation/1": [1]},
        "step-000004": {"sudoku/train/1": [1]},
    }
    index = written(tmp_path, steps, 1)
    panel = task_map(task_rows(index, "held-out", ""), "held-out")
    assert [chart.title for chart in panel.charts] == ["office: 1 tasks", "sudoku: 1 tasks"]
    assert trace_of(index, "held-out", 1)["z"] == [[0, 1]]
    assert trace_of(index, "held-out", 1)["customdata"] == [["eval-000000/0", "eval-000004/0"]]
    assert task_map([], "train").notes == ["no task is like this"]


def test_a_task_that_only_failed_is_last_and_has_no_share(tmp_path):
    writer = RolloutWriter(tmp_path / "rollouts", ENVS)
    failed = Failed(Task("sudoku/train/f", "sudoku", "a", {}), "timeout", "slow", "", ["timeout"])
    writer.write("step-000001", [failed, failed, Completed(played("sudoku/train/n", 0.0))], 2)
    index = RunIndex(RunFiles(tmp_path))
    index.refresh()
    trace = trace_of(index)
    assert trace["y"] == ["2. sudoku/train/f", "1. sudoku/train/n"] and trace["z"] == [[None], [0]]
    assert trace["text"] == [["0 of 2"], ["0 of 1"]]


def test_of_many_tasks_and_steps_an_even_part_and_the_newest_are_shown_and_the_page_says_so(tmp_path):
    row = {"offset": 0, "length": 9, "line": 0, "index": 0, "env": "sudoku", "outcome": "completed"}
    rows = [
        row | {"file": f"step-{step:06d}", "number": n, "group": n, "key": f"sudoku/train/{n:04d}"}
        | {"reward": float(n % 2), "success": bool(n % 2)}
        for step in range(1, 131)
        for n in range(0, 900, 90 if step > 1 else 1)
    ]  # fmt: skip
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    index = RunIndex(RunFiles(tmp_path))
    index.refresh()
    [chart] = task_map(task_rows(index, "train", ""), "train").charts
    assert chart.title == "sudoku: 300 of 900 tasks, the last 120 of 130 steps"
    trace = chart.figures[""]["data"][0]
    assert len(trace["y"]) == 300 and trace["x"] == [str(step) for step in range(11, 131)]
    assert [len(line) for line in trace["z"]] == [120] * 300


def test_hostile_keys_are_text_in_the_map_and_stay_apart(tmp_path):
    keys = [f"sudoku/train/<b>{EVIL}{'x' * 60}{end}" for end in "12"]
    index = written(tmp_path, {"step-000001": {key: [1.0, 0.0] for key in keys}})
    names = trace_of(index)["y"]
    assert len(set(names)) == 2 and not OBEYED & set("".join(names)) and "<" not in "".join(names)
    with served(tmp_path) as viewer:
        text = viewer.get(f"{viewer.root}tasks?split=train").text
        assert "<script>alert" not in text and not OBEYED & set(text)
        assert 'data-group="/r/' in text and "/group/~file/~group" in text
