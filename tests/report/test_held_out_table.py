"""The table at a run's end has the intervals of its held-out tasks, from the index of its rollouts."""

from __future__ import annotations

import random

from scipy import stats

from gymexp.config.schema import EnvConfig
from gymexp.report.held_out import read_held_out
from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Task, Turn
from gymexp.rollout.rollout_files import RolloutWriter
from gymexp.statistics import paired_change, reward_interval
from gymexp.view.table import held_out_table

ENVS = {name: EnvConfig("c", "a") for name in ("sudoku", "workplace")}


def outcomes(env: str, rewards: list[float | None]) -> list[Outcome]:
    tasks = [Task(f"{env}/validation/{number}", env, "a", {}) for number in range(len(rewards))]
    return [
        Failed(task, "timeout", "slow")
        if reward is None
        else Completed(Rollout(task, [Turn([1], [2], [-0.5])], reward, []))
        for task, reward in zip(tasks, rewards, strict=True)
    ]


def write(directory, step: int, rewards: dict[str, list[float | None]]) -> None:
    some = [outcome for env, values in rewards.items() for outcome in outcomes(env, values)]
    RolloutWriter(directory, ENVS, 1_000).write(f"eval-{step:06d}", some, 8)


def test_changes_are_those_of_the_first_and_the_newest_evaluation_without_failed_tasks(tmp_path):
    write(tmp_path, 0, {"sudoku": [0.0, 0.5, 1.0, None, 0.0, 0.0, 0.0, 0.0], "workplace": [0.0] * 6})
    write(tmp_path, 5, {"sudoku": [9.0] * 8, "workplace": [9.0] * 6})
    write(
        tmp_path, 10, {"sudoku": [1.0, 0.5, None, 1.0, 0.0, 0.0, 0.0, 1.0], "workplace": [None, *[1.0] * 5]}
    )
    found = read_held_out(tmp_path)
    before = {"a": 0.0, "b": 0.5, "c": 0.0, "d": 0.0, "e": 0.0, "f": 0.0}
    assert found["sudoku"].change == paired_change(before, before | {"a": 1.0, "f": 1.0})
    after = {str(task): [reward] for task, reward in enumerate([1.0, 0.5, 1.0, 0.0, 0.0, 0.0, 1.0])}
    assert found["sudoku"].after == reward_interval(after), "also of the task that failed before"
    assert found["workplace"].change is found["workplace"].after is None, "it has five tasks"
    counts = {env: (of_env.num_scored, of_env.num_failed) for env, of_env in found.items()}
    assert counts == {"sudoku": (7, 1), "workplace": (5, 1)}
    assert read_held_out(tmp_path / "none") == {}


def test_without_an_evaluation_after_training_nothing_is_compared(tmp_path):
    write(tmp_path, 0, {"sudoku": [0.5] * 8})
    assert read_held_out(tmp_path) == {}


def test_failed_rollouts_are_counted_and_shown_as_zeros(tmp_path):
    write(tmp_path, 0, {"sudoku": [0.2] * 8})
    write(tmp_path, 10, {"sudoku": [0.9] * 6 + [None] * 2})
    metrics = {
        "reward": [0.2, 0.9],
        "rollouts": [8, 8],
        "failed": [0.0, 0.125],
        "prompts_too_long": [0.0, 0.125],
    }
    text = held_out_table({"held_out": {"sudoku": metrics}}, read_held_out(tmp_path))
    _, row, counts, *_ = text.splitlines()
    assert row.endswith("6 better, 0 worse of 6")
    scored = "after 6 of 8 scored, 2 failed (reward 0.675 with these as 0)"
    assert counts == f"sudoku: before 8 of 8 scored, 0 failed; {scored}"


def test_the_table_has_intervals_and_adjusted_p(tmp_path):
    draw = random.Random(3)
    before = {env: [draw.random() for _ in range(60)] for env in ENVS}
    after = {"sudoku": [v + draw.gauss(0.3, 0.2) for v in before["sudoku"]], "workplace": before["workplace"]}
    write(tmp_path, 0, before)
    write(tmp_path, 10, after)
    held_out = {env: {"reward": [0.25, 0.5]} for env in ENVS} | {"new": {"reward": [None, 0.5]}}
    text = held_out_table({"held_out": held_out}, read_held_out(tmp_path))
    head, sudoku, workplace, new, note, *_ = text.splitlines()
    assert " ".join(head.split()) == "held-out reward before after change 95 % interval p detectable tasks"
    assert sudoku.startswith("sudoku ") and "<0.001" in sudoku and sudoku.endswith("worse of 60")
    half = stats.t.ppf(0.975, 59) * stats.sem(before["sudoku"])
    assert f" 0.250 ± {half:.3f} " in sudoku
    assert "[+0.000, +0.000]" in workplace and " 1.000 " in workplace and workplace.endswith("of 60")
    assert new.split() == ["new", "–", "0.500", *["–"] * 5]
    assert note.startswith("± and [ ] are 95 % intervals over tasks")


def test_a_single_evaluation_has_its_interval_alone(tmp_path):
    write(tmp_path, 10, {"sudoku": [0.0, 1.0] * 4})
    text = held_out_table({"held_out": {"sudoku": {"reward": [None, 0.5]}}}, read_held_out(tmp_path))
    half = stats.t.ppf(0.975, 7) * stats.sem([0.0, 1.0] * 4)
    head, row, note = text.splitlines()
    assert head.split()[-1] == "change" and row.split() == ["sudoku", "–", "0.500", "±", f"{half:.3f}", "–"]
    assert note.startswith("± and [ ] are")


def test_without_an_index_the_table_has_no_intervals(tmp_path):
    held_out = {"sudoku": {"reward": [0.25, 0.5], "rollouts": [8, 8], "failed": [0.0, 0.0]}}
    head, row, counts = held_out_table({"held_out": held_out}, read_held_out(tmp_path)).splitlines()
    assert (head.split(), row.split()[1:]) == (
        ["held-out", "reward", "before", "after", "change"],
        ["0.250", "0.500", "+0.250"],
    )
    assert counts.endswith("after 8 of 8 scored, 0 failed")
    assert held_out_table({"held_out": {}}, {}) == ""
