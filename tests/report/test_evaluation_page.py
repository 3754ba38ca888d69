"""The page of an evaluation's directory: its panels, what an empty one says, intervals as in results.json."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from gymexp.config.schema import EnvConfig, EvaluationConfig, ModelConfig, RunConfig
from gymexp.evaluation import results
from gymexp.evaluation.plan import Plan, Policy
from gymexp.record.directory import RunDirectory
from gymexp.report.evaluation_panels import find_in_evaluation
from gymexp.report.page import panels_of, run_page
from gymexp.report.run_records import read_records
from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Task, Truncated, Turn
from gymexp.rollout.rollout_files import RolloutWriter

ENVS = {name: EnvConfig("c.yaml", "agent", success_reward=0.9) for name in ("sudoku", "office")}
CONFIG = RunConfig(
    name="trial", model=ModelConfig("tiny", "here"), env=ENVS, evaluation=EvaluationConfig(temperature=1.0)
)
MODELS = (
    Policy("model", "step 8", "eval-000008", 8),
    Policy("model", "step 16 <b>&amp;", "eval-000016", 16),
)


def outcome(env: str, number: int, reward: float | None, cut: bool = False) -> Outcome:
    task = Task(f"{env}/validation/{number}", env, "agent", {})
    if reward is None:
        return Failed(task, "timeout", "slow")
    rollout = Rollout(task, [Turn([1], [2, 3], [-0.5, -0.1])], reward, [], verdict={"is_correct": reward > 0})
    return Truncated(rollout, "length") if cut else Completed(rollout)


def evaluate(
    path: Path,
    *policies: Policy,
    samples: int = 2,
    tasks: int = 12,
    fail: bool = True,
    reward: float | None = None,
) -> Path:
    """A finished evaluation with every file that its page reads. The later a policy, the better."""
    draw = random.Random(1)
    run = RunDirectory(path)
    run.rollouts.mkdir(parents=True)
    (path / "config.yaml").write_text(json.dumps({"name": "trial", "env": {env: {} for env in ENVS}}))
    plan = Plan(list(policies), samples, "validation")
    plan.write(path)
    keys = {f"{env}/validation/{number}": "hash" for env in ENVS for number in range(tasks)}
    (path / "tasks.json").write_text(json.dumps(keys))
    writer = RolloutWriter(run.rollouts, ENVS)
    for place, policy in enumerate(policies):
        played = [
            outcome(env, number, reward if reward is not None else float(draw.random() < 0.4 + 0.4 * place))
            for env in ENVS
            for number in range(tasks)
            for _ in range(samples)
        ]
        if fail:
            played[0], played[1] = outcome("sudoku", 0, None), outcome("sudoku", 0, 1.0, cut=True)
        writer.write(policy.file, played, samples)
    results.write(run, CONFIG, plan)
    return path


def panels(path: Path) -> dict:
    return {panel.id: panel for panel in panels_of(read_records(path))}


def test_its_intervals_are_those_of_the_results(tmp_path):
    """By policy and environment: results.json has ten digits, the page three."""
    path = evaluate(tmp_path / "e", *MODELS)
    found = {
        (policy["label"], env): numbers
        for policy in json.loads((path / "results.json").read_text())["policies"]
        for env, numbers in policy["envs"].items()
    }
    [table] = panels(path)["results"].tables
    assert len(table.rows) == len(found) == 4
    for row in table.rows:
        cells = dict(zip(table.head, row, strict=True))
        numbers = found[cells["policy"], cells["environment"]]
        assert cells["scored"] == f"{numbers['scored']}/{numbers['planned']}"
        for place, metric in ((4, "reward"), (6, "success")):
            one = numbers[metric]
            assert row[place] == f"{one['mean']:.3f}"
            assert row[place + 1] == f"[{one['low']:.3f}, {one['high']:.3f}]"
        assert float(cells["failures as 0"]) == pytest.approx(
            numbers["reward_failures_as_zero"]["mean"], abs=5e-4
        )
    reward = panels(path)["results"].charts[0].figures[""]["data"][0]
    intervals = [found[policy.label, reward["name"]]["reward"] for policy in MODELS]
    assert reward["y"] == pytest.approx([one["mean"] for one in intervals], abs=1e-4)
    lows = [y - reach for y, reach in zip(reward["y"], reward["error_y"]["arrayminus"], strict=True)]
    assert lows == pytest.approx([one["low"] for one in intervals], abs=1e-3)


def test_it_has_the_panels_of_an_evaluation_and_an_empty_one_says_why(tmp_path):
    found = panels(evaluate(tmp_path / "e", *MODELS))
    assert list(found) == [
        "results", "samples", "endings", "tasks", "hacking", "machine", "events", "config", "versions",
    ]  # fmt: skip
    empty = {name for name, panel in found.items() if panel.is_empty}
    assert empty == {"machine", "events"} and all(found[name].notes for name in empty)
    [endings] = found["endings"].tables
    assert endings.head[2:] == ["completed", "cut off by length", "failed by timeout"]
    assert endings.rows[0] == ["step 8", "sudoku", "22", "1", "1"]
    [heat] = [chart.figures[""]["data"][0] for chart in found["tasks"].charts if "sudoku" in chart.title]
    assert heat["x"] == ["step 8", "step 16 &lt;b&gt;&amp;amp;"]
    [fields] = found["hacking"].tables
    assert next(row[:3] for row in fields.rows if row[0] == "office") == ["office", "is_correct", "True"]


def test_one_sample_a_task_gives_no_pass_at_k_and_the_panel_says_what_would(tmp_path):
    found = panels(evaluate(tmp_path / "e", MODELS[0], samples=1))
    assert found["samples"].is_empty and "evaluation.samples=4" in found["samples"].notes[0]
    several = panels(evaluate(tmp_path / "f", MODELS[0], samples=4))["samples"].tables[0]
    assert list(several.head)[3:] == ["k = 1", "k = 2", "k = 4"] and len(several.rows) == 6


def test_one_that_goes_on_has_a_page(tmp_path):
    path = evaluate(tmp_path / "e", *MODELS)
    (path / "results.json").unlink()
    text = run_page(read_records(path))
    assert "not played to its end yet" in text and "cut off by length" in text


def test_its_findings_are_the_change_what_failed_and_what_is_paid_for_nothing(tmp_path):
    two = find_in_evaluation(read_records(evaluate(tmp_path / "two", *MODELS)))
    assert two[0].text.startswith("step 8 → step 16") and "95 % interval" in two[0].text
    assert [one.panel for one in two[1:]] == ["endings"] * 2 and "4.2% of the rollouts failed" in two[1].text
    one = find_in_evaluation(read_records(evaluate(tmp_path / "one", MODELS[0], fail=False)))
    assert len(one) == 1 and one[0].mark == "fact" and "24 of 24 rollouts scored" in one[0].text
    probe = Policy("probe", "probe: yes", "eval-000000", reply="yes")
    paid = find_in_evaluation(read_records(evaluate(tmp_path / "paid", probe, fail=False, reward=0.1)))
    assert len(paid) == 2 and "The grader of sudoku pays 0.100 on average for “probe: yes”" in paid[0].text
    fair = find_in_evaluation(read_records(evaluate(tmp_path / "fair", probe, fail=False, reward=0.09)))
    assert [one.mark for one in fair] == ["good"]


def test_its_page_agrees_with_the_table_of_tasks(tmp_path):
    """Always, sometimes and never solved, counted anew from results.csv."""
    path = evaluate(tmp_path / "e", MODELS[0], fail=False)
    lines = list(csv.DictReader((path / "results.csv").open()))
    for row in panels(path)["results"].tables[0].rows:
        solved = [(int(line["successes"]), int(line["n"])) for line in lines if line["env"] == row[1]]
        counts = (
            sum(s == n for s, n in solved),
            sum(0 < s < n for s, n in solved),
            sum(s == 0 for s, _ in solved),
        )
        assert row[-1] == " / ".join(map(str, counts))
