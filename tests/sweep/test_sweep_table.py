"""A sweep's tables: seeds taken together, and runs without a good end told apart."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from scipy import stats
from written_runs import write_run

from gymexp.report.page import plotly_script
from gymexp.sweep import sweep_reader
from gymexp.sweep.page import results_html
from gymexp.sweep.table import groups_of, results_csv, results_table, rows_of, status_table


@pytest.fixture
def sweep(tmp_path):
    """Two learning rates with two seeds each: one run failed, one was killed."""
    given = ["env=[sudoku,workplace]"]
    write_run(tmp_path / "0", [*given, "trainer.learning_rate=1e-6", "seed=0"], gain=1.0)
    write_run(tmp_path / "1", [*given, "trainer.learning_rate=1e-6", "seed=1"], gain=0.5)
    error = {"error": "too few rollouts <landed>"}
    ends = {"outcome": "the trainer ended", "result": error}
    write_run(tmp_path / "2", [*given, "trainer.learning_rate=1e-5", "seed=0"], steps=2, **ends)
    write_run(tmp_path / "3", [*given, "trainer.learning_rate=1e-5", "seed=1"], outcome=None, pid=2**22 + 1)
    return sweep_reader.read_sweep(tmp_path)


def test_states_are_those_of_the_runs_and_a_killed_one_is_lost(sweep):
    assert [job.run.state for job in sweep.jobs] == ["finished", "finished", "failed", "lost"]
    assert sweep.keys == ["trainer.learning_rate", "seed"]
    shown = status_table(sweep)
    assert "job 2 failed: too few rollouts <landed>" in shown
    assert "4 jobs: 2 finished, 1 failed, 1 lost" in shown


def test_a_run_that_was_not_evaluated_after_a_step_has_no_reward_after_training(tmp_path):
    error = {"outcome": "the trainer ended", "result": {"error": "the trainer ended"}}
    write_run(tmp_path / "0", ["seed=0"], steps=0, **error)
    write_run(tmp_path / "1", ["seed=1"], steps=2, **error)
    sweep = sweep_reader.read_sweep(tmp_path)
    first, second = rows_of(sweep)
    assert first.reward("sudoku") == (0.7, None)
    assert second.reward("sudoku") == pytest.approx((0.7, 0.8))
    assert "sudoku 0.700 → –  workplace" in status_table(sweep)


def test_seeds_are_one_row_with_mean_sample_deviation_and_best(sweep):
    first, second = groups_of(rows_of(sweep))
    after = first.after("sudoku")
    assert (after.mean, after.std, after.best) == pytest.approx((0.85, 0.0707107, 0.9))
    assert first.after().mean == pytest.approx((0.85 + 0.575) / 2)
    assert (second.seeds, second.others) == ("0/2", "1 failed, 1 lost")
    assert second.after().mean is None, "what has not finished is not averaged"


def write_held_out(run, after: list[float | None]) -> None:
    """The index of an evaluation before training, and of one after four steps; None is a failed rollout."""
    (run / "rollouts").mkdir()
    rows = [
        {"file": file, "env": "sudoku", "key": f"sudoku/{task}"}
        | ({} if reward is None else {"reward": reward})
        for file, rewards in (("eval-000000", [0.5] * len(after)), ("eval-000004", after))
        for task, reward in enumerate(rewards)
    ]
    (run / "rollouts" / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_intervals_are_over_seeds_or_over_the_tasks_of_a_single_run(sweep):
    after = [0.0, 0.5, 1.0, 1.0, 0.5, 1.0, None]
    for name in ("0", "1"):
        write_held_out(sweep.path / name, after)
    rows = rows_of(sweep)
    seeds = stats.t.interval(0.95, 1, 0.85, stats.sem([0.8, 0.9]))
    tasks = stats.t.interval(0.95, 5, 2 / 3, stats.sem(after[:6]))
    text, lines = (
        results_table(rows, sweep.keys),
        list(csv.DictReader(io.StringIO(results_csv(rows, sweep.keys)))),
    )
    assert f"→ 0.850 [{seeds[0]:.3f}, {seeds[1]:.3f}]" in text and " 12/14, 2 failed " in text
    for line, expected in ((lines[0], tasks), (lines[4], seeds)):
        assert [float(line[f"sudoku_after_{end}"]) for end in ("low", "high")] == pytest.approx(
            list(expected)
        )
    assert (lines[0]["held_out_scored"], lines[0]["held_out_failed"]) == ("6", "1")
    page = results_html(sweep, rows)
    assert f"[{tasks[0]:.3f}, {tasks[1]:.3f}]" in page and f"[{seeds[0]:.3f}, {seeds[1]:.3f}]" in page
    assert ">6/7, 1 failed</td>" in page and ">12/14, 2 failed</td>" in page
    alone = groups_of(rows[:1])[0].after("sudoku").interval
    assert alone and (alone.low, alone.high) == pytest.approx(tasks)


def test_the_csv_has_a_line_a_run_and_one_a_configuration(sweep):
    lines = list(csv.DictReader(io.StringIO(results_csv(rows_of(sweep), sweep.keys))))
    assert [line["kind"] for line in lines] == ["run"] * 4 + ["seeds"] * 2
    assert lines[2]["why"] == "too few rollouts <landed>"
    assert float(lines[4]["sudoku_after"]) == pytest.approx(0.85)


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(sweep):
    page = results_html(sweep, rows_of(sweep))
    assert page.count('class="chart"') == 5, (
        "an environment's held-out and training reward, and the swept key"
    )
    assert "&lt;landed&gt;" in page and "<landed>" not in page
    assert " src=" not in page.replace(plotly_script(), "") and "<link" not in page


def test_a_job_leads_to_the_report_of_its_run_if_it_has_one(sweep):
    (sweep.path / "1" / "report.html").write_text("made")
    page = results_html(sweep, rows_of(sweep)).replace(plotly_script(), "")
    assert re.findall(r'<a href="([^#"]+)">(\d)</a>', page) == [("1/report.html", "1")]
