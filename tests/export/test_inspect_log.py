"""Rollouts as Inspect's log: the real inspect_ai reads it back, whatever is in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from exported_run import EVIL, TASKS, write_run
from uv import find_uv_bin
from whole_run import ROOT

from gymexp.errors import GymexpError
from gymexp.export.card_facts import held_out_table
from gymexp.export.inspect_log import INSPECT, sample_of
from gymexp.export.selection import select
from gymexp.printable import printable
from gymexp.rollout.rollout_files import load_index, read_index, read_outcome

# What Inspect itself makes of the log, as JSON.
READER = """
import json, sys
from inspect_ai.log import read_eval_log
calls = lambda message: getattr(message, "tool_calls", None) or []
log = read_eval_log(sys.argv[1])
print(json.dumps({
    "task": log.eval.task, "model": log.eval.model, "mean": log.results.scores[0].metrics["mean"].value,
    "samples": [{
        "id": s.id, "epoch": s.epoch, "metadata": s.metadata, "error": s.error and s.error.message,
        "score": s.scores and s.scores["reward"].value, "why": s.scores and s.scores["reward"].explanation,
        "messages": [[m.role, m.text, [[c.function, c.arguments, c.parse_error] for c in calls(m)]]
            for m in s.messages],
    } for s in log.samples],
}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("outputs") / "demo")


def chosen(run: Path, **more: object) -> list[dict]:
    return select(run, Namespace(**{"eval": None, "steps": None, "env": None, "limit": None} | more))


def export(run: Path, *arguments: object, code: int = 0, **environ: str) -> str:
    words = [sys.executable, "-m", "gymexp.export", str(run), *map(str, arguments)]
    env = os.environ | environ
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, timeout=400, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def read(log: Path) -> dict:
    words = [find_uv_bin(), "run", "--isolated", "--no-project", "--quiet", "--python", sys.executable]
    words += ["--with", INSPECT, "python", "-c", READER, str(log)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.e2e
def test_inspect_reads_back_the_samples_scores_and_messages_and_hostile_text(run, tmp_path):
    assert "12 rollouts (evaluation after step 4)" in export(run, "--inspect", tmp_path / "a b.eval")
    log = read(tmp_path / "a b.eval")
    assert log["task"] == "demo: evaluation after step 4" and log["model"] == "gymexp/tiny"
    assert log["mean"] == pytest.approx(8.5 / 11) and len(log["samples"]) == TASKS
    shown = printable(EVIL)
    assert "\x1b" not in json.dumps(log, ensure_ascii=False) and "\u202e" not in shown
    samples = {sample["id"]: sample for sample in log["samples"]}
    failed, one = samples["office/validation/0"], samples["office/validation/1"]
    assert failed["score"] is None and failed["error"] == f"timeout: slow {shown}"
    assert one["score"] == 1.0 and one["why"] == f'judge: {{"ok": true}}\nnote: {shown}'
    assert one["messages"] == [
        ["user", f"Look 1 up {shown}", []],
        [
            "assistant",
            "",
            [
                ["look_up", {"who": "Ann"}, None],
                ["look_up", {"arguments": "{who"}, one["messages"][1][2][1][2]],
            ],
        ],
        ["tool", f"no such person {shown}", []],
        ["assistant", f"Done. {shown}", []],
    ]
    assert one["messages"][1][2][1][2], "the error of the broken call"
    assert (one["metadata"]["env"], one["metadata"]["step"], one["metadata"]["tokens"]) == ("office", 4, 2)


def test_training_rollouts_have_their_step_and_advantage_and_ids_of_their_own(run):
    rows = chosen(run, steps="3:4")
    samples = [sample_of(row, read_outcome(run / "rollouts", row), None, row["number"] / 10) for row in rows]
    assert len({(s["id"], s["epoch"]) for s in samples}) == len(samples) == 16
    assert {s["metadata"]["step"] for s in samples} == {3, 4}
    assert samples[-1]["metadata"]["advantage"] == 0.7 and samples[-1]["limit"] == "length"


def test_without_a_network_it_is_one_line_with_a_fix(run, tmp_path):
    text = export(
        run, "--inspect", tmp_path / "x.eval", code=1, UV_OFFLINE="1", UV_CACHE_DIR=str(tmp_path / "uv")
    )
    assert (
        text.startswith(f"error: --inspect needs {INSPECT}")
        and text.count("\n") == 1
        and "UV_INDEX_URL" in text
    )
    assert not (tmp_path / "x.eval").exists()


def test_the_newest_evaluation_is_chosen_unless_told_otherwise(run):
    assert {row["file"] for row in chosen(run)} == {"eval-000004"}
    assert {row["file"] for row in chosen(run, eval=0)} == {"eval-000000"}
    assert {row["file"] for row in chosen(run, steps="3:4")} == {"step-000003", "step-000004"}
    assert {row["file"] for row in chosen(run, steps="3")} == {"step-000003"}


def test_a_limit_takes_rollouts_from_all_over_the_selection(run):
    assert [row["number"] for row in chosen(run, steps="4", limit=4)] == [0, 2, 4, 6]
    assert len(chosen(run, limit=100)) == TASKS


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"eval": 2}, r"--eval must name steps that this run has \(0, 4\), got 2"),
        ({"steps": "5:9"}, r"--steps must name steps that this run has \(3, 4\), got 5:9"),
        ({"steps": "4:3"}, "--steps must be A:B"),
        ({"steps": "a"}, "--steps must be A:B"),
        ({"env": "chess"}, "--env must be one of office, got 'chess'"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_named_with_what_there_is(run, more, text):
    with pytest.raises(GymexpError, match=text):
        chosen(run, **more)


def test_an_older_run_without_an_index_is_selected_and_read():
    older = Path(__file__).parent.parent / "rollout" / "older_run"
    rows = chosen(older, steps="1:2")
    samples = [sample_of(row, read_outcome(older / "rollouts", row), None, None) for row in rows]
    assert len(samples) == 16 and {s["metadata"]["step"] for s in samples} == {1, 2}
    assert len(chosen(older)) == 4 and chosen(older)[0]["file"] == "eval-000000"
    assert held_out_table(load_index(older / "rollouts"), 0, ["sudoku"])[0]["planned"] == 2


def test_a_calls_arguments_hide_no_control_behind_an_escape():
    hidden = json.dumps({"who": "\x1b]52;\u202e"})
    item = {"type": "function_call", "call_id": "c", "name": "look_up", "arguments": hidden}
    record = {"outcome": "completed", "rollout": {"items": [item], "reward": 1.0}}
    row = {"file": "eval-000000", "key": "office/validation/0", "index": 0}
    [message] = sample_of(row, record, None, None)["messages"]
    assert json.loads(message["calls"][0]["arguments"]) == {"who": "\\x1b]52;\\u202e"}


def test_a_task_whose_row_is_not_in_the_run_has_its_own_messages_alone(run):
    row = read_index(run / "rollouts")[0]
    sample = sample_of(row, read_outcome(run / "rollouts", row), None, None)
    assert sample["input"] == [] and [m["role"] for m in sample["messages"]] == [
        "assistant",
        "tool",
        "assistant",
    ]
    assert sample["messages"][0]["reasoning"] == "hm"
