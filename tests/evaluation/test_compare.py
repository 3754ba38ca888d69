"""Evaluations are compared by task, and only where the task's row is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gymexp.errors import ConfigError, RunDirectoryError
from gymexp.evaluation.compare import compare
from gymexp.evaluation.plan import Plan, Policy


def evaluated(
    path: Path, rewards: dict[str, list[float]], changed: tuple[str, ...] = (), env: str = "sudoku"
) -> str:
    """A directory with these rewards by task; the rows of `changed` are others."""
    (path / "rollouts").mkdir(parents=True)
    rows = [
        {"file": "eval-000000", "key": f"{env}/validation/{key}", "env": env, "reward": reward}
        for key, values in rewards.items()
        for reward in values
    ]
    (path / "rollouts" / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hashes = {f"{env}/validation/{key}": f"{key}{key in changed}" for key in rewards}
    (path / "tasks.json").write_text(json.dumps(hashes))
    Plan([Policy("model", "tiny", "eval-000000")], 1, "validation").write(path)
    return str(path)


TEN = {str(n): [0.0, 1.0] if n % 2 else [0.0, 0.0] for n in range(10)}
BETTER = {key: [1.0, 1.0] for key in TEN}


def test_two_evaluations_are_paired_by_task_with_interval_and_p(tmp_path):
    said = compare([evaluated(tmp_path / "a" / "one", TEN), evaluated(tmp_path / "a" / "two", BETTER)])
    line = next(line for line in said.splitlines() if line.startswith("a/two"))
    cells = line.split()
    assert cells[:6] == ["a/two", "sudoku", "10", "0.250", "1.000", "+0.750"]
    # all ten differences are positive: 2 of the 2**10 choices of signs are as far from 0
    assert float(cells[8]) == pytest.approx(2 / 2**10, abs=0.0006) and cells[-1] == "10/0/0"
    assert said.startswith("first: a/one")


def test_tasks_with_other_rows_are_left_out_and_counted(tmp_path):
    one = evaluated(tmp_path / "one", TEN)
    two = evaluated(tmp_path / "two", BETTER | {"x": [1.0]}, changed=("3", "4"))
    said = compare([one, two])
    assert "2 tasks left out, whose rows differ" in said
    assert "1 tasks left out, which one side alone has scored" in said
    assert " 8 " in next(line for line in said.splitlines() if "two  " in line)


def test_evaluations_without_a_common_task_are_refused_with_the_count(tmp_path):
    one = evaluated(tmp_path / "one", TEN)
    with pytest.raises(ConfigError, match=r"fewer than two in common.*10 tasks have the same key"):
        compare([one, evaluated(tmp_path / "two", TEN, changed=tuple(TEN))])


def test_one_directory_of_one_policy_is_no_comparison_and_an_empty_one_has_no_rollouts(tmp_path):
    one = evaluated(tmp_path / "one", TEN)
    with pytest.raises(ConfigError, match="compare must name two"):
        compare([one])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirectoryError, match="empty has none"):
        compare([one, str(tmp_path / "empty")])


def test_p_is_adjusted_for_the_number_of_rows(tmp_path):
    one, two, three = (
        evaluated(tmp_path / name, rewards) for name, rewards in (("1", TEN), ("2", BETTER), ("3", BETTER))
    )
    alone, both = compare([one, two]), compare([one, two, three])
    p = [
        float(next(line for line in said.splitlines() if "/2  " in line).split()[8]) for said in (alone, both)
    ]
    assert p[1] == pytest.approx(2 * p[0], abs=0.001)


def test_two_evaluations_with_equal_rewards_have_no_interval_of_no_width(tmp_path):
    said = compare([evaluated(tmp_path / "one", TEN), evaluated(tmp_path / "two", TEN)])
    line = next(line for line in said.splitlines() if "two  " in line)
    assert "+0.000  all equal  1.000  –  " in line
