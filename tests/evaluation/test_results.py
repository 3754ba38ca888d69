"""What an evaluation's results say, from an index that a test has written."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from gymexp.config.schema import EnvConfig, EvaluationConfig, ModelConfig, RunConfig
from gymexp.evaluation import results
from gymexp.evaluation.plan import Plan, Policy
from gymexp.record.directory import RunDirectory

CONFIG = RunConfig(
    name="trial",
    model=ModelConfig("tiny", "here"),
    env={"sudoku": EnvConfig("a.yaml", "agent", success_reward=0.9)},
    evaluation=EvaluationConfig(temperature=1.0),
)


def row(key: str, sample: int, reward: float | None, file: str = "eval-000000", **fields) -> dict:
    row = {"file": file, "key": f"sudoku/validation/{key}", "env": "sudoku", "index": sample, "failures": []}
    if reward is None:
        return row | {"outcome": "failed", "cause": "timeout"}
    played = {"reward": reward, "success": reward >= 0.9, "turns": 1, "tokens": 10, "outcome": "completed"}
    return row | played | fields


def write(path: Path, rows: list[dict], *policies: Policy, samples: int = 2) -> tuple[str, dict]:
    """What `results.write` printed, and results.json."""
    run = RunDirectory(path)
    run.rollouts.mkdir(parents=True)
    (run.rollouts / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = dict.fromkeys(dict.fromkeys(row["key"] for row in rows), "hash")
    (path / "tasks.json").write_text(json.dumps(keys))
    plan = Plan(list(policies or [Policy("model", "tiny", "eval-000000")]), samples, "validation")
    return results.write(run, CONFIG, plan), json.loads((path / "results.json").read_text())


ROWS = [
    row(key, sample, reward)
    for key, rewards in (("0", (1.0, 1.0)), ("1", (1.0, 0.0)), ("2", (0.5, None)))
    for sample, reward in enumerate(rewards)
]


def test_means_are_over_tasks_and_failures_are_told(tmp_path):
    said, found = write(tmp_path, ROWS)
    numbers = found["policies"][0]["envs"]["sudoku"]
    assert (numbers["planned"], numbers["scored"], numbers["failed"]) == (6, 5, 1)
    assert numbers["reward"]["mean"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert numbers["reward_failures_as_zero"]["mean"] == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert (numbers["always"], numbers["sometimes"], numbers["never"]) == (1, 1, 1)
    assert "5/6" in said and "failures as 0" in said and "0.583" in said
    assert "sudoku 1/1/1" in said and "other training seeds" in said.replace("\n", " ")


def test_the_table_of_tasks_has_a_line_for_each_with_its_failures(tmp_path):
    write(tmp_path, ROWS)
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [line["key"][-1] for line in lines] == ["0", "1", "2"]
    assert [(line["n"], line["successes"], line["failed"], line["causes"]) for line in lines] == [
        ("2", "2", "0", ""),
        ("2", "1", "0", ""),
        ("1", "0", "1", "timeout"),
    ]
    assert float(lines[1]["sd"]) == pytest.approx(0.5**0.5) and lines[2]["sd"] == ""


def test_the_order_in_which_rollouts_landed_and_how_long_they_took_changes_no_byte(tmp_path):
    write(tmp_path / "a", ROWS)
    slower = [row | {"seconds": {"total": 9.0}, "began": 5.0, "failures": ["engine"]} for row in ROWS]
    write(tmp_path / "b", slower)
    for name in ("results.json", "results.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_several_policies_have_a_row_each_and_the_run_shows_first_and_last(tmp_path):
    rows = [*ROWS[:4], *(row(key, n, 0.0, "eval-000016") for key in "01" for n in range(2))]
    policies = Policy("model", "step 8", "eval-000000", 8), Policy("model", "step 16", "eval-000016", 16)
    said, found = write(tmp_path, rows, *policies)
    assert [policy["label"] for policy in found["policies"]] == ["step 8", "step 16"]
    assert "step 8   sudoku" in said and "step 16  sudoku" in said
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {"step": 16, "stopped": False, "held_out": {"sudoku": {"reward": [0.75, 0.0]}}}


@pytest.mark.parametrize(("reward", "is_finding"), [(0.1, True), (0.09, False)])
def test_a_grader_that_pays_for_a_canned_reply_is_a_finding(tmp_path, reward, is_finding):
    rows = [row(key, n, reward) for key in "01" for n in range(2)]
    probe = Policy("probe", "probe: yes", "eval-000000", reply="yes")
    said, _ = write(tmp_path, rows, probe)
    assert ("finding: the grader of sudoku pays 0.100 on average for the reply 'yes'" in said) == is_finding


def test_an_endpoint_that_counts_no_tokens_has_none_in_the_table(tmp_path):
    said, found = write(tmp_path, [row(key, n, 1.0, tokens=None) for key in "01" for n in range(2)])
    assert found["policies"][0]["envs"]["sudoku"]["tokens_p50"] is None
    assert "– / –" in said


def cells(said: str, env: str = "sudoku") -> list[str]:
    return re.split(r"\s{2,}", next(line for line in said.splitlines() if line.startswith(env)))


def test_one_task_has_its_mean_and_no_interval(tmp_path):
    said, found = write(tmp_path, [row("0", n, reward) for n, reward in enumerate((1.0, 0.5))])
    assert cells(said)[:9] == ["sudoku", "1", "2", "2/2", "0", "0.750", "–", "0.500", "–"]
    assert "–: an interval needs two tasks with a scored sample." in said
    assert found["policies"][0]["envs"]["sudoku"]["mean_reward"] == 0.75
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["held_out"] == {"sudoku": {"reward": [None, 0.75]}}


def test_equal_rewards_have_no_interval_of_no_width_and_success_has_wilsons(tmp_path):
    said, _ = write(tmp_path, [row(key, n, 1.0) for key in "0123" for n in range(2)])
    assert cells(said)[5:9] == ["1.000", "all equal", "1.000", "[0.510, 1.000]"], "Wilson's of 4 of 4"
    assert "all equal: every task has the same mean reward, so their spread is not known." in said


def test_an_environment_without_a_scored_rollout_says_so_and_hides_no_other(tmp_path):
    said, _ = write(tmp_path, [row(key, n, None) for key in "01" for n in range(2)])
    assert cells(said)[1:9] == ["2", "2", "0/4", "4", "–", "–", "–", "–"]
    assert "sudoku 0/0/0 and 2 without a scored sample" in said and "nan" not in said.lower()


def test_an_interval_beyond_the_rewards_is_explained_and_not_cut_off(tmp_path):
    said, found = write(tmp_path, [row(key, 0, float(key != "0")) for key in "012"], samples=1)
    half = 4.302652729911275 * (1 / 3) ** 0.5 / 3**0.5  # t(0.975, 2) of a table, sd of 0, 1, 1
    assert found["policies"][0]["envs"]["sudoku"]["reward"]["high"] == pytest.approx(2 / 3 + half)
    assert "knows no bounds: with so few tasks it reaches beyond the rewards that were given " in said
    assert "(sudoku [0.000, 1.000])" in said
    said, _ = write(tmp_path / "more", [row(str(n), 0, n / 40) for n in range(40)], samples=1)
    assert "knows no bounds" not in said


def test_a_probe_of_one_task_is_a_finding_too(tmp_path):
    probe = Policy("probe", "probe: yes", "eval-000000", reply="yes")
    said, _ = write(tmp_path, [row("0", 0, 0.5)], probe, samples=1)
    assert "finding: the grader of sudoku pays 0.500 on average for the reply 'yes'" in said
