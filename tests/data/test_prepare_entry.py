"""`python -m gymexp.prepare` as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gym

PROJECT = Path(__file__).resolve().parents[2]
ROW = '{"responses_create_params": {"input": "2 + 2?"}, "question": "", "answer": "4", "metadata": %s}\n'


def run(directory: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gymexp.prepare", *overrides]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "GYMEXP_CACHE": str(directory / "cache")}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def own_files(tmp_path, gym_python) -> list[str]:
    (tmp_path / "mine.jsonl").write_text(ROW % '{"source_dataset": "chain_sum"}' * 3)
    at = "env.sudoku.data"
    mine = f"gym.python={gym_python}"
    return [mine, f"{at}.source=jsonl", f"{at}.train_file=mine.jsonl", f"{at}.validation_file=mine.jsonl"]


def test_it_says_what_a_run_would_train_on_and_leaves_nothing_behind_but_the_cache(tmp_path, own_files):
    done = run(tmp_path, *own_files)
    assert done.returncode == 0, done.stderr
    assert "train           3 rows  sha256" in done.stdout
    assert "training set: 3 tasks an epoch: sudoku 3 (100%)" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"mine.jsonl", "cache"}


def test_bad_rows_end_it_with_their_lines_and_no_traceback(tmp_path, own_files):
    (tmp_path / "mine.jsonl").write_text(ROW % "{}")
    done = run(tmp_path, *own_files)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "mine.jsonl:1: metadata.source_dataset: must be a string, but it is missing" in done.stderr


def test_a_mistyped_key_ends_it_before_anything_is_made(tmp_path):
    done = run(tmp_path, "env.sudoku.wieght=2")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "weight" in done.stderr
    assert list(tmp_path.iterdir()) == []
