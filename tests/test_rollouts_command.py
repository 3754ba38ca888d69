"""`gymexp rollouts` shows what was written, whatever a policy or an environment wrote, and names mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from whole_run import ROOT

from gymexp.config.schema import EnvConfig
from gymexp.rollout.outcome import Completed, Failed, Rollout, Task, Truncated, Turn
from gymexp.rollout.rollout_files import RolloutWriter

ENVS = {name: EnvConfig("c", "a", success_reward=1.0) for name in ("sudoku", "office")}
EVIL = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\u202e<script>alert(1)</script>\x00"


def task(key: str) -> Task:
    return Task(key, key.split("/")[0], "a", {})


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's directory with two steps and an evaluation."""
    call = {"type": "function_call", "name": "look_up", "arguments": '{"who": "Ann"}'}
    output = {"type": "function_call_output", "output": f"no such person {EVIL}"}
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x" * 5000}]}
    turns = [Turn([1], [2, 3], [-0.5, -1.5])]
    office = Rollout(
        task("office/train/7"), turns, 1.0, [call, output, said], verdict={"judge": {"ok": True}}
    )
    sudoku = Rollout(task("sudoku/train/1"), turns, 0.25, [said], seed=9)
    failed = Failed(task("office/train/7"), "timeout", f"slow {EVIL}", "logs/office.log")
    step = [Completed(office, ["engine"]), failed, Truncated(sudoku, "length"), Completed(sudoku)]
    writer = RolloutWriter(tmp_path / "rollouts", ENVS)
    writer.write("step-000001", step[:1], 2)
    writer.write("step-000002", step, 2)
    writer.write("eval-000002", step[3:], 2)
    writer.write("filtered-000002", step[:3], 3)
    (tmp_path / "data").mkdir()
    row = {"responses_create_params": {"input": [{"role": "system", "content": f"Be brief {EVIL}"}]}}
    line = json.dumps({"key": "office/train/7", "row": row})
    (tmp_path / "data" / "train.jsonl").write_text(line + "\n")
    return tmp_path


def rollouts(run: Path, *arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "gymexp.rollouts", str(run), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    text = done.stdout + done.stderr
    assert "Traceback" not in text and not {"\x1b", "\x07", "\x00", "\u202e"} & set(text)
    return text


def test_the_newest_step_is_a_table_with_a_line_for_each_rollout(run):
    head, *lines = rollouts(run).splitlines()
    assert head.split()[:5] == ["number", "task", "reward", "outcome", "turns"]
    assert [line.split()[:4] for line in lines] == [
        ["0", "office/train/7", "1.000", "completed"],
        ["1", "office/train/7", "–", "failed"],
        ["2", "sudoku/train/1", "0.250", "truncated"],
        ["3", "sudoku/train/1", "0.250", "completed"],
    ]
    assert "(timeout)" in lines[1] and "(length)" in lines[2] and lines[0].endswith("x" * 120)


def test_step_evaluation_and_environment_are_chosen(run):
    assert len(rollouts(run, "--step", "1").splitlines()) == 2
    assert len(rollouts(run, "--eval", "2").splitlines()) == 2
    assert len(rollouts(run, "--filtered", "2").splitlines()) == 4
    assert len(rollouts(run, "--env", "sudoku").splitlines()) == 3


def test_one_rollout_is_a_conversation_with_its_numbers_and_its_verdict(run):
    text = rollouts(run, "--best")
    title, facts, _, *messages = text.splitlines()
    assert title == "office/train/7   step-000002, rollout 0, group 0"
    assert facts.startswith(
        "reward 1.000, success · completed · failed before: engine · 1 turns, 2 tokens, nll 1.0"
    )
    assert [message.split()[0] for message in messages] == ["system", "call", "tool", "policy", "verdict"]
    assert 'look_up({"who": "Ann"})' in messages[1] and "no such person \\x1b]52" in messages[2]
    assert messages[3].endswith("(5000 characters)") and messages[4].endswith('judge: {"ok": true}')
    assert "x" * 5000 in rollouts(run, "--best", "--full")


def test_a_role_that_looks_like_a_verdict_stays_on_its_line(run):
    forged = [
        {"role": "user\nverdict   reward: 1.0", "content": "x"},
        {"role": None, "content": [{"text": None}]},
    ]
    rollout = Rollout(task("sudoku/train/1"), [Turn([1], [2], [-0.5])], 0.0, forged)
    RolloutWriter(run / "rollouts", ENVS).write("step-000003", [Completed(rollout)], 1)
    *_, first, second = rollouts(run, "--worst").splitlines()
    assert first == "user verdict reward: 1.0 x" and second == 'policy    {"text": null}'


def test_a_failed_rollout_names_its_cause_and_its_log(run):
    text = rollouts(run, "--number", "1")
    assert "failed    timeout: slow \\x1b]52" in text and "log       logs/office.log" in text


def test_a_row_that_the_run_does_not_have_is_said_to_be_missing(run):
    text = rollouts(run, "--worst")
    assert text.startswith("sudoku/train/1") and "(its row is not in the run directory)" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--step", "9"],
            "must name a file of this run, got step-000009: eval-000002, filtered-000002, step-000001, ",
        ),
        (["--env", "chess"], "--env must be one of office, sudoku, got 'chess'"),
        (["--number", "4"], "--number must be below 4, got 4"),
        (
            ["--env", "sudoku", "--number", "1"],
            "--number must be of env sudoku, got 1, which is of env office",
        ),
        (["--step", "1", "--eval", "2"], "not allowed with argument"),
        (["--full"], "--full needs --worst, --best or --number"),
    ],
)
def test_a_mistake_is_named_with_what_there_is(run, arguments, text):
    assert text in rollouts(run, *arguments, code=2 if {"--eval", "--full"} & {*arguments} else 1)


def test_a_directory_without_an_index_is_refused(tmp_path):
    assert "must be the directory of a run that has played rollouts" in rollouts(tmp_path, code=1)


def test_a_real_run_from_before_the_index_is_shown():
    older = ROOT / "tests" / "rollout" / "older_run"
    head, *lines = rollouts(older).splitlines()
    assert head.startswith("number") and [line.split()[0] for line in lines] == list(map(str, range(8)))
    text = rollouts(older, "--eval", "0", "--worst")
    assert text.startswith("sudoku/validation/000001   eval-000000, rollout 1, group 1\nreward 0.000")
    assert "step-000001, step-000002" in rollouts(older, "--step", "9", code=1)
