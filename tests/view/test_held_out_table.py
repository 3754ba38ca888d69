"""The table at a run's end has the intervals of its held-out tasks, from the index of its rollouts."""

from __future__ import annotations

import random

from gymexp.config.schema import EnvConfig
from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Task, Turn
from gymexp.rollout.rollout_files import RolloutWriter
from gymexp.statistics import paired_change
from gymexp.view.table import held_out_table, read_changes

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


def test_changes_are_those_of_the_first_and_the_last_evaluation_without_failed_tasks(tmp_path):
    write(tmp_path, 0, {"sudoku": [0.0, 0.5, 1.0, None, 0.0, 0.0, 0.0, 0.0], "workplace": [0.0] * 6})
    write(tmp_path, 5, {"sudoku": [9.0] * 8, "workplace": [9.0] * 6})
    write(
        tmp_path, 10, {"sudoku": [1.0, 0.5, None, 1.0, 0.0, 0.0, 0.0, 1.0], "workplace": [None, *[1.0] * 5]}
    )
    found = read_changes(tmp_path, 10)
    before = {"a": 0.0, "b": 0.5, "c": 0.0, "d": 0.0, "e": 0.0, "f": 0.0}
    expected = paired_change(before, before | {"a": 1.0, "f": 1.0})
    assert found == {"sudoku": expected}, "six tasks of one, five of the other"
    held_out = {"sudoku": {"reward": [0.2, 0.9], "rollouts": [8, 8]}}
    line = held_out_table({"held_out": held_out}, found).splitlines()[1]
    assert line.split()[:4] == ["sudoku", "0.200", "0.900", "+0.333"], "the change of the same tasks"
    assert line.endswith("2 better, 0 worse of 6, 2 failed in one")
    assert read_changes(tmp_path / "none", 10) == {}


def test_the_table_has_interval_and_adjusted_p(tmp_path):
    draw = random.Random(3)
    before = {env: [draw.random() for _ in range(60)] for env in ENVS}
    after = {"sudoku": [v + draw.gauss(0.3, 0.2) for v in before["sudoku"]], "workplace": before["workplace"]}
    write(tmp_path, 0, before)
    write(tmp_path, 10, after)
    held_out = {env: {"reward": [0.25, 0.5]} for env in ENVS} | {"new": {"reward": [None, 0.5]}}
    text = held_out_table({"held_out": held_out}, read_changes(tmp_path, 10))
    head, sudoku, workplace, new, note, _ = text.splitlines()
    assert " ".join(head.split()) == "held-out reward before after change 95 % interval p tasks"
    assert sudoku.startswith("sudoku ") and "<0.001" in sudoku and sudoku.endswith("worse of 60")
    assert "[+0.000, +0.000]" in workplace and " 1.000 " in workplace and workplace.endswith("of 60")
    assert new.split() == ["new", "–", "0.500", "–", "–", "–", "–"]
    assert note.startswith("change, 95 % interval and p are over the tasks that both")
