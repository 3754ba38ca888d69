"""What is written is read back, one by one and whole, over appends, replacements and older files."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest
import zstandard

from gymexp.config.schema import EnvConfig
from gymexp.errors import RunDirectoryError
from gymexp.rollout.outcome import (
    Completed,
    Failed,
    Outcome,
    Rollout,
    Task,
    Truncated,
    Turn,
    outcome_from_json,
    outcome_to_json,
)
from gymexp.rollout.rollout_files import (
    RolloutWriter,
    load_index,
    read_index,
    read_names,
    read_outcome,
    read_outcomes,
    read_train_index,
    read_trained,
)
from gymexp.rollout.trained import Trained

ENVS = {"e": EnvConfig("c", "a", success_reward=0.5)}
TASKS = [Task(f"e/train/{number}", "e", "a", {}) for number in range(3)]


def completed(task: Task, reward: float) -> Outcome:
    turns = [Turn([1, 2], [3], [-0.5]), Turn([1, 2, 3, 4], [5, 6], [-1.0, -3.0])]
    items = [
        {"type": "function_call", "name": "look"},
        {"type": "message", "content": [{"type": "output_text", "text": "the answer " * 40}]},
        {"type": "function_call_output", "output": "later"},
    ]
    return Completed(Rollout(task, turns, reward, items, seed=7, replica="e-1", began=5.0), ["timeout"])


def group(task: Task) -> list[Outcome]:
    cut = Rollout(task, [Turn([1], [2], [-0.25])], 0.0, [])
    return [completed(task, 1.0), Truncated(cut, "turns"), Failed(task, "engine", "gone " * 100)]


def as_read(outcomes: list[Outcome]) -> list[dict]:
    return [orjson.loads(orjson.dumps(outcome_to_json(outcome))) for outcome in outcomes]


def check_index(directory: Path, name: str, outcomes: list[Outcome]) -> None:
    """Each line of the index leads to its outcome, in order."""
    rows = [row for row in read_index(directory) if row["file"] == name]
    assert [row["number"] for row in rows] == list(range(len(outcomes)))
    assert [read_outcome(directory, row) for row in rows] == as_read(outcomes)
    assert list(read_outcomes(directory / f"{name}.jsonl.zst")) == as_read(outcomes)


def write(directory: Path, name: str, outcomes: list[Outcome], group_size: int) -> None:
    """As a process that continues after any step."""
    RolloutWriter(directory, ENVS, 1_000).write(name, outcomes, group_size)


def test_what_is_written_is_read_back_by_its_line_of_the_index(tmp_path):
    outcomes = [outcome for task in TASKS for outcome in group(task)]
    write(tmp_path, "step-000001", outcomes, 3)
    check_index(tmp_path, "step-000001", outcomes)
    rows = read_index(tmp_path)
    assert [row["group"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [row["index"] for row in rows] == [0, 1, 2] * 3
    assert len({(row["offset"], row["length"]) for row in rows}) == 3, "a frame a group"


def test_a_line_of_the_index_has_what_a_table_shows(tmp_path):
    write(tmp_path, "step-000001", group(TASKS[0]), 3)
    first, cut, failed = read_index(tmp_path)
    assert (
        first["failures"] == ["timeout"] and first["success"] and first["text"] == ("the answer " * 40)[:120]
    )
    assert (first["turns"], first["prompt_tokens"], first["tokens"], first["nll"]) == (2, 2, 3, 1.5)
    assert (first["seed"], first["replica"], first["began"], first["tool_calls"]) == (7, "e-1", 5.0, 1)
    assert (cut["outcome"], cut["limit"], cut["success"], cut["text"]) == ("truncated", "turns", False, "")
    assert (failed["outcome"], failed["cause"], failed["text"]) == ("failed", "engine", ("gone " * 100)[:300])
    assert (first["tool_errors"], cut["tool_errors"]) == (0, 0)
    assert all(row["key"] == "e/train/0" and row["env"] == "e" for row in (first, cut, failed))


def test_the_index_has_the_fields_of_a_verdict_that_can_be_counted_within_bounds(tmp_path):
    small = {"is_correct": True, "score": 0.5, "label": "wrong tool", "count": 3}
    large = {"answer": "x" * 25, "lines": "a\nb", "judge": {"a": 1}, "steps": [1], "n" * 41: True}
    many = {f"field_{number}": number for number in range(100)}
    for verdict, kept in (({**large, **small}, small), (many, dict(list(many.items())[:12])), ({}, {})):
        rollout = Rollout(TASKS[0], [Turn([1], [2], [-0.5])], 1.0, [], verdict=verdict)
        write(tmp_path, "step-000001", [Completed(rollout)], 1)
        assert read_index(tmp_path)[0]["verdict"] == kept
        assert read_outcome(tmp_path, read_index(tmp_path)[0])["rollout"].get("verdict", {}) == verdict


def test_a_later_collection_of_a_step_is_added_and_earlier_lines_stay_right(tmp_path):
    writer = RolloutWriter(tmp_path, ENVS)
    writer.write("step-000001", group(TASKS[0]), 3)
    writer.write("eval-000001", group(TASKS[1]), 8)
    later = group(TASKS[2]) + group(TASKS[0])
    writer.write("step-000001", later, 3, earlier={"e/train/0": 3})
    check_index(tmp_path, "step-000001", group(TASKS[0]) + later)
    check_index(tmp_path, "eval-000001", group(TASKS[1]))
    rows = [row for row in read_index(tmp_path) if row["file"] == "step-000001"]
    assert [row["group"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [row["index"] for row in rows] == [0, 1, 2, 0, 1, 2, 3, 4, 5], "as the draws are counted"


def test_a_resumed_run_forgets_what_it_will_play_again_and_a_torn_line(tmp_path):
    writer = RolloutWriter(tmp_path, ENVS)
    for step in (1, 2, 3):
        writer.write(f"step-{step:06d}", group(TASKS[0]), 3)
        writer.write(f"eval-{step:06d}", group(TASKS[1]), 3)
    with (tmp_path / "index.jsonl").open("a") as index:
        index.write('{"file": "eval-0000')
    resumed = RolloutWriter(tmp_path, ENVS, last_step=2)
    files = ["step-000001", "eval-000001", "step-000002", "eval-000002"]
    assert list(dict.fromkeys(row["file"] for row in read_index(tmp_path))) == files
    resumed.write("step-000003", group(TASKS[2]), 3)
    for name, task in zip([*files, "step-000003"], [0, 1, 0, 1, 2], strict=True):
        check_index(tmp_path, name, group(TASKS[task]))
    assert (tmp_path / "eval-000003.jsonl.zst").exists(), "until it is written again"
    RolloutWriter(tmp_path, ENVS)
    assert read_index(tmp_path) == [], "a run that begins again"


def test_a_file_that_was_deleted_or_written_again_is_no_other_rollout(tmp_path):
    write(tmp_path, "step-000001", group(TASKS[0]), 3)
    rows = read_index(tmp_path)
    (tmp_path / "step-000001.jsonl.zst").write_bytes(zstandard.compress(b"{}\n" * 100))
    for damage in (None, (tmp_path / "step-000001.jsonl.zst").unlink):
        if damage:
            damage()
        with pytest.raises(RunDirectoryError, match="must have rollout 2, but was deleted or written again"):
            read_outcome(tmp_path, rows[2])
    write(tmp_path, "step-000001", group(TASKS[1]), 3)
    check_index(tmp_path, "step-000001", group(TASKS[1]))


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([{"type": "message", "content": "plain"}], "plain"),
        ([{"role": "user", "content": [{"text": "a"}, {"text": None}, "b"]}], 'a{"text": null}b'),
        ([{"type": "message", "content": "first"}, {"type": "function_call"}], "first"),
        ([], ""),
    ],
)
def test_the_last_message_is_found_whatever_its_form(tmp_path, items, text):
    rollout = Rollout(TASKS[0], [Turn([1], [2], [-0.5])], 1.0, items)
    write(tmp_path, "step-000001", [Completed(rollout)], 1)
    assert read_index(tmp_path)[0]["text"] == text


def test_a_file_that_is_written_again_has_its_new_lines_alone(tmp_path):
    write(tmp_path, "step-000001", group(TASKS[0]), 3)
    write(tmp_path, "step-000002", group(TASKS[1]), 3)
    write(tmp_path, "step-000001", [completed(TASKS[2], 0.5)], 3)
    check_index(tmp_path, "step-000001", [completed(TASKS[2], 0.5)])
    check_index(tmp_path, "step-000002", group(TASKS[1]))


def test_a_file_from_before_the_index_is_read(tmp_path):
    lines = b"".join(orjson.dumps(record) + b"\n" for record in as_read(group(TASKS[0])))
    (tmp_path / "step-000001.jsonl.zst").write_bytes(zstandard.compress(lines))
    assert list(read_outcomes(tmp_path / "step-000001.jsonl.zst")) == as_read(group(TASKS[0]))
    assert read_index(tmp_path) == []


OLDER_RUN = Path(__file__).parent / "older_run" / "rollouts"  # of commit 9ddf273: no index, schema 1


def test_a_real_run_from_before_the_index_can_be_read_by_lines_made_from_its_files():
    rows = load_index(OLDER_RUN)
    assert {row["file"] for row in rows} == {"eval-000000", "step-000001", "step-000002"}
    for row in rows:
        record = read_outcome(OLDER_RUN, row)
        rollout = record["rollout"]
        assert record["schema"] == 1 and rollout["reward"] == row["reward"]
        assert row["tokens"] == sum(len(turn["completion_ids"]) for turn in rollout["turns"])
        assert row["began"] is None and row["success"] == (row["reward"] == 1.0)
    step = load_index(OLDER_RUN, "step-000002")
    assert step == [row for row in rows if row["file"] == "step-000002"]
    assert [(row["group"], row["index"], row["number"]) for row in step] == [
        (number // 4, number % 4, number) for number in range(8)
    ]
    assert [row["env"] for row in step] == ["sudoku"] * 4 + ["workplace"] * 4
    assert [row["tool_calls"] for row in step] == [0] * 4 + [1, 0, 0, 0]


def test_a_run_that_was_resumed_with_an_index_shows_its_earlier_steps_and_no_stale_ones(tmp_path):
    directory = tmp_path / "rollouts"
    shutil.copytree(OLDER_RUN, directory)
    for name in ("step-000004", "notes", "step-000002.train"):
        shutil.copy(directory / "step-000001.jsonl.zst", directory / f"{name}.jsonl.zst")
    write(directory, "step-000003", group(TASKS[0]), 3)
    names = ["eval-000000", "step-000001", "step-000002", "step-000003"]
    assert read_names(directory) == names == list(dict.fromkeys(row["file"] for row in load_index(directory)))
    assert {row.get("success") for row in load_index(directory, "step-000001")} == {None}, "no config.yaml"
    assert load_index(directory, "step-000003") == read_index(directory)


def test_an_older_file_that_is_damaged_is_named(tmp_path):
    for content in (
        b"no frame",
        zstandard.compress(b'{"outcome": "completed"}\n'),
        zstandard.compress(b"[]"),
    ):
        (tmp_path / "step-000001.jsonl.zst").write_bytes(content)
        with pytest.raises(RunDirectoryError, match=r"step-000001\.jsonl\.zst must have a rollout"):
            load_index(tmp_path)


def trained(number: int) -> Trained:
    """Distinct from any other number's."""
    logprobs = np.array([-0.1 * number, math.nan, -1.25], dtype=np.float32)
    return Trained(number / 4, 2, 1.5 + number, logprobs, None, logprobs * 2 if number % 2 else 0.5)


def check_trained(directory: Path, name: str, numbers: list[int | None]) -> None:
    """numbers: which `trained` each rollout of the file has; None for a failed rollout."""
    rows = [row for row in read_train_index(directory) if row["file"] == name]
    assert [row["number"] for row in rows] == list(range(len(numbers)))
    for row, number in zip(rows, numbers, strict=True):
        record = read_trained(directory, row)
        assert record.keys() == {"number", "advantage", "trained", "logprobs", "ref_logprobs", "weights"}
        assert (record["number"], record["ref_logprobs"]) == (row["number"], None)
        if number is None:
            assert (record["advantage"], record["trained"], record["logprobs"]) == (None, 0, None)
            assert (row["advantage"], row["ratio_max"]) == (None, None)
        else:
            assert record["advantage"] == row["advantage"] == number / 4 and row["ratio_max"] == 1.5 + number
            assert record["logprobs"] == [pytest.approx(-0.1 * number), None, -1.25]
            assert record["weights"] == ([pytest.approx(-0.2 * number), None, -2.5] if number % 2 else 0.5)


def test_what_the_trainer_made_of_each_rollout_is_read_back_by_its_number(tmp_path):
    writer = RolloutWriter(tmp_path, ENVS)
    failed = Trained(None, 0)
    writer.write_trained("step-000001", [trained(3), failed, trained(1), trained(2)], 2)
    writer.write_trained("step-000001", [trained(8), trained(9)], 2, first=4)
    writer.write_trained("step-000002", [trained(5)], 2)
    check_trained(tmp_path, "step-000001", [3, None, 1, 2, 8, 9])
    check_trained(tmp_path, "step-000002", [5])
    frames = {(row["file"], row["offset"], row["length"]) for row in read_train_index(tmp_path)}
    assert len(frames) == 4, "one a group"
    writer.write_trained("step-000001", [trained(7)], 2)
    check_trained(tmp_path, "step-000001", [7])
    check_trained(tmp_path, "step-000002", [5])
    assert read_index(tmp_path) == [] == read_names(tmp_path), "no file of rollouts"


def test_a_resumed_run_forgets_the_training_that_it_will_repeat(tmp_path):
    writer = RolloutWriter(tmp_path, ENVS)
    for step in (1, 2, 3):
        writer.write_trained(f"step-{step:06d}", [trained(step)], 1)
    stale = read_train_index(tmp_path)[2]
    resumed = RolloutWriter(tmp_path, ENVS, last_step=2)
    assert [row["file"] for row in read_train_index(tmp_path)] == ["step-000001", "step-000002"]
    resumed.write_trained("step-000003", [trained(4)], 1)
    check_trained(tmp_path, "step-000003", [4])
    with pytest.raises(RunDirectoryError, match="must have rollout 0, but was deleted or written again"):
        read_trained(tmp_path, stale)


def test_an_outcome_is_made_again_from_its_line():
    for outcome in group(TASKS[0]):
        [record] = as_read([outcome])
        assert outcome_from_json(record) == outcome
