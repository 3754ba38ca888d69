"""The pages that compare runs of different ways, against figures by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_learning_benchmark import ROOT, write_run


def compare(script: str, target: Path, *runs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / script, target, *runs]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows(page: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"
    ]


def with_steps(directory: Path, **metrics: float) -> Path:
    """Gives each step of a run more metrics, as many as its number times these."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "time/step" in line:
            line |= {name: line["step"] * value for name, value in metrics.items()}
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return directory


def test_overlap_is_compared_with_runs_in_turn(tmp_path):
    in_turn = write_run(tmp_path / "a", 0, overlap={"max_staleness": 0})
    ahead = write_run(tmp_path / "b", 2, overlap={"max_staleness": 4})
    with_steps(
        ahead, **{"staleness/mean": 0.5, "staleness/max": 1, "overlap/turns_cut": 3, "idle/trainer": 0.1}
    )
    made = compare("overlap.py", tmp_path / "page", ahead, in_turn)
    assert (made.returncode, made.stderr) == (0, "")
    table = rows((tmp_path / "page" / "summary.md").read_text())
    # In turn the tasks change by 0.25, 0 and 0.5; ahead by 0.75, 0 and 0.5, so they differ by 0.5, 0 and 0.
    assert table[2][0] == "in_turn" and table[2][1].startswith("+0.250 ±") and table[2][3] == ""
    assert table[3][0] == "max_staleness_4" and table[3][1].startswith("+0.417 ±")
    assert table[3][3].startswith("+0.167 ±")
    assert ["in_turn", "0.100 (0.000)", "0.500 (0.000)"] in table, "the held-out reward at steps 0 and 3"
    assert ["max_staleness_4", "1.00", "3", "6.0", "20%", "3.0e-03", "20.00"] in table
    steps = (tmp_path / "page" / "steps.csv").read_text().splitlines()
    assert steps[0].startswith("run,seed,step,seconds,staleness/mean") and len(steps) == 1 + 2 * 3
    assert "max_staleness_4,2,3,30,1.5,3,9,0.3,,," in steps
    assert (tmp_path / "page" / "in_turn_0.csv").read_text().splitlines()[1] == "sudoku/validation/0,0,0.25"


@pytest.mark.parametrize("script", ["overlap.py", "curriculum.py"])
def test_without_a_run_of_the_way_that_others_are_compared_with_it_says_so(script, tmp_path):
    dataset = {"schedule": {}, "sampling": "difficulty"}
    run = write_run(tmp_path / "a", 0, overlap={"max_staleness": 1}, dataset=dataset)
    made = compare(script, tmp_path / "page", run)
    assert made.returncode == 2 and "no RUN_DIR has" in made.stderr


def test_a_curriculum_is_compared_with_a_flat_mix(tmp_path):
    flat = write_run(tmp_path / "a", 0, dataset={"schedule": {}, "sampling": "uniform"})
    other = write_run(tmp_path / "b", 2, dataset={"schedule": {"0": {}}, "sampling": "difficulty"})
    made = compare("curriculum.py", tmp_path / "page", flat, other)
    assert (made.returncode, made.stderr) == (0, "")
    table = rows((tmp_path / "page" / "summary.md").read_text())
    assert table[2][0] == "flat" and table[3][0] == "schedule_difficulty"
    assert table[3][3].startswith("+0.167 ±")
