"""The run directory of a stranger makes the viewer read and run nothing but the run's own plain files."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import zstandard
from viewed_runs import ENVS, played, served, write_run

from gymexp.errors import RunDirectoryError
from gymexp.record import own_files
from gymexp.record.own_files import decompressed, parsed
from gymexp.rollout.outcome import Completed
from gymexp.rollout.rollout_files import RolloutWriter, load_index
from gymexp.view.run_files import RunFiles
from gymexp.view.run_index import RunIndex
from gymexp.view.viewed_run import runs_at

SECRET = "actually-private-text"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "private.yaml").write_text(f"name: {SECRET}\n")
    (tmp_path / "private.log").write_text(SECRET)
    return write_run(tmp_path / "run")


def index_of(run) -> RunIndex:
    index = RunIndex(RunFiles(run))
    index.refresh()
    return index


def numbers(index: RunIndex) -> int:
    return index.query("SELECT COUNT(*) AS num FROM rollouts")[0]["num"]


NAMES = (
    "config.yaml", "versions.txt", "metrics.jsonl", "status.json", "logs/office.log", "data/train.jsonl",
    "rollouts/index.jsonl", "rollouts/step-000002.jsonl.zst", "model/tokenizer.json",
)  # fmt: skip
PAGES = (
    "", "config", "log/office.log", "rollouts", "rollout/step-000002/0", "step/step-000002", "steps",
    "rollout/step-000002/0/tokens", "rollout/step-000002/0/task", "compare",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_the_run_is_not_followed_on_any_page(run, name):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to("../" * (name.count("/") + 1) + "private.yaml")
    with served(run) as viewer:
        for page in PAGES:
            answer = viewer.get(viewer.root + page)
            assert answer.status in (200, 404, 409) and SECRET not in answer.text, page


def test_a_link_within_the_run_is_followed_and_a_folder_of_links_is_not(run, tmp_path):
    files = RunFiles(run)
    (run / "versions.txt").symlink_to("config.yaml")
    assert "tiny" in (files.read_text("versions.txt") or "")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "private.log").write_text(SECRET)
    (run / "logs").rename(run / "logs.old")
    (run / "logs").symlink_to(tmp_path / "elsewhere")
    assert files.names("logs", ".log") == []
    with pytest.raises(RunDirectoryError, match="leads out of it"):
        files.open("logs/private.log")


def test_of_a_run_from_before_the_index_the_viewer_shows_what_the_report_counts(tmp_path):
    run = Path(__file__).parents[1] / "rollout" / "older_run"
    shown = index_of(run).query("SELECT * FROM rollouts ORDER BY file, number")
    counted = {(row["file"], row["number"]): row for row in load_index(run / "rollouts")}
    assert len(shown) == len(counted) > 10
    same = (
        "key",
        "env",
        "outcome",
        "reward",
        "success",
        "turns",
        "tokens",
        "nll",
        "tool_calls",
        "text",
        "line",
    )
    for row in shown:
        theirs = counted[row["file"], row["number"]]
        assert [row[name] for name in same] == [theirs.get(name) for name in same]
        assert (row["grp"], row["idx"]) == (theirs["group"], theirs["index"])


def test_of_a_strangers_old_file_each_damaged_line_is_left_out_and_the_others_keep_their_place(tmp_path):
    older = Path(__file__).parents[1] / "rollout" / "older_run"
    run = shutil.copytree(older, tmp_path / "run")
    path = next(iter(sorted((run / "rollouts").glob("step-*.zst"))))
    whole = zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True).read()
    good = whole.splitlines()[0]
    record = json.loads(good)
    odd = [b"{", b"[1]", b"7", b"{}"]
    for key in ({"a": 1}, ["x"], None, 7):
        inner = record["rollout"] | {"task": record["rollout"]["task"] | {"key": key}}
        odd.append(json.dumps(record | {"rollout": inner}).encode())
    for wrong in ({"turns": 3}, {"turns": [{"logprobs": ["x"]}]}, {"reward": "high"}, {"items": 5}):
        odd.append(json.dumps(record | {"rollout": record["rollout"] | wrong}).encode())
    path.write_bytes(zstandard.compress(b"\n".join([good, *odd, good]) + b"\n"))
    rows = index_of(run).query(
        "SELECT * FROM rollouts WHERE file = ?", (path.name.removesuffix(".jsonl.zst"),)
    )
    numbers = [row["number"] for row in rows]
    assert numbers[0] == 0 and numbers[-1] == len(odd) + 1
    assert {row["line"] for row in rows} == set(numbers)
    assert all(isinstance(row["key"], str) for row in rows)


def test_a_pipe_does_not_make_the_viewer_wait(run):
    (run / "versions.txt").unlink(missing_ok=True)
    os.mkfifo(run / "versions.txt")
    began = time.monotonic()
    with pytest.raises(RunDirectoryError, match="must be a plain file"):
        RunFiles(run).read("versions.txt")
    assert time.monotonic() - began < 5


def test_a_frame_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(own_files, "MAX_FRAME", 1 << 20)
    small = zstandard.compress(b"x" * (1 << 20))
    assert decompressed(small, tmp_path) == b"x" * (1 << 20)
    with pytest.raises(RunDirectoryError, match="at most 1 MB"):
        decompressed(zstandard.compress(b"x" * ((1 << 20) + 1)), tmp_path)
    with pytest.raises(RunDirectoryError, match="damaged"):
        decompressed(small[:-5] + b"12345", tmp_path)


def test_a_frame_has_at_most_256_mb():
    assert own_files.MAX_FRAME == 256 * 2**20


def test_json_that_is_too_deep_or_damaged_is_no_value():
    assert parsed(b"[" * 60 + b"]" * 60) is not None
    for line in (b"[" * 100 + b"]" * 100, b"[" * 100_000, b"{", b"\xff", b"NaN"):
        assert parsed(line) is None


def test_a_configuration_with_aliases_is_not_expanded(run):
    (run / "config.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    assert RunFiles(run).read_config() == {}
    (run / "config.yaml").write_text("!!python/object/apply:os.system ['true']")
    assert RunFiles(run).read_config() == {}


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../../private"}, {"file": "/etc/passwd"}, {"file": "step-1"}, {"file": 7}, {"number": -1},
        {"offset": -5}, {"length": "x"}, {"key": None}, {"outcome": "<b>"}, {"env": ["x"]}, {"line": 1 << 70},
    ],
)  # fmt: skip
def test_a_strange_line_of_the_index_is_left_out_and_counted(run, change):
    path = run / "rollouts" / "index.jsonl"
    whole = numbers(index_of(run))
    first = json.loads(path.read_text().splitlines()[0])
    with path.open("a") as file:
        file.write(json.dumps({**first, "number": 99, **change}) + "\n[1]\n\nnot json\n")
        file.write(json.dumps({**first, "number": 77, "seed": "x", "seconds": [1], "failures": {}}) + "\n")
    index = index_of(run)
    assert numbers(index) == whole + 1 and index.num_damaged == 4


def test_a_line_that_is_too_long_is_left_out(run):
    path = run / "rollouts" / "index.jsonl"
    whole = numbers(index_of(run))
    with path.open("ab") as file:
        file.write(b'{"x": "' + b"x" * (10 << 20) + b'"}\n')
        file.write(path.read_bytes().splitlines()[0].replace(b'"number":0', b'"number":55') + b"\n")
    assert numbers(index_of(run)) == whole + 1


def of_rollout(**fields) -> dict:
    return {"rollout": {"task": {"key": "sudoku/train/1"}, **fields}}


def turn(prompt, sampled, logprobs) -> dict:
    return {"prompt_ids": prompt, "completion_ids": sampled, "logprobs": logprobs}


RECORDS = [
    {"outcome": "completed"},
    {"rollout": 7},
    of_rollout(turns=3),
    of_rollout(turns=[{"prompt_ids": "x"}], items=[1, None, {"type": 4}]),
    of_rollout(turns=[turn([1], [2**40], [0])]),
    of_rollout(items={"a": 1}, verdict=[1], turns=[turn([1], [2, 3], [None, "x"])]),
    of_rollout(turns=[turn([1], [2], [-0.1]), turn([1], [2], [-0.1])]),
    {"task": {"key": "sudoku/train/1"}, "outcome": "failed", "cause": {"a": 1}, "log": ["x"], "failures": 3},
]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_of_another_shape_is_shown_or_refused_but_breaks_nothing(run, record):
    frame = zstandard.compress(json.dumps(record).encode() + b"\n")
    (run / "rollouts" / "step-000001.jsonl.zst").write_bytes(frame)
    path = run / "rollouts" / "index.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["file"] == "step-000001":
            row |= {"offset": 0, "length": len(frame), "line": 0}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with served(run) as viewer:
        for page in ("", "/tokens", "/task", "/verdict", "/raw"):
            assert viewer.get(f"{viewer.root}rollout/step-000001/0{page}").status in (200, 409), page
        assert viewer.get(f"{viewer.root}group/step-000001/0").status in (200, 409)


def test_a_missing_file_is_named(run):
    (run / "rollouts" / "step-000001.jsonl.zst").unlink()
    with served(run) as viewer:
        answer = viewer.get(f"{viewer.root}rollout/step-000001/0")
    assert answer.status == 409 and "step-000001.jsonl.zst is not there" in answer.text


def test_what_a_run_appends_takes_back_or_replaces_is_followed(run):
    index = index_of(run)
    first = numbers(index)
    writer = RolloutWriter(run / "rollouts", ENVS, last_step=2)
    index.refresh()
    assert numbers(index) == first
    writer.write("step-000003", [Completed(played("sudoku/train/1", 1.0)) for _ in range(4)], 4)
    index.refresh()
    assert numbers(index) == first + 4
    writer = RolloutWriter(run / "rollouts", ENVS, last_step=1)  # as a resumed run takes steps 2 and 3 back
    index.refresh()
    assert {row["file"] for row in index.query("SELECT DISTINCT file FROM rollouts")} == {
        "eval-000000", "step-000001",
    }  # fmt: skip
    writer.write("step-000002", [Completed(played("sudoku/train/1", 0.0)) for _ in range(2)], 2)
    index.refresh()
    assert numbers(index) == 8 + 4 + 2
    path = run / "rollouts" / "index.jsonl"
    content = path.read_bytes()
    with path.open("r+b") as file:  # the same file, cut and written to the same length
        file.truncate(0)
        file.write(content.replace(b"sudoku/train/1", b"sudoku/train/9"))
    index.refresh()
    assert not index.query("SELECT 1 FROM rollouts WHERE key = 'sudoku/train/1'")
    path.unlink()
    index.refresh()
    assert numbers(index) == 8 + 4 + 2 + 8 + 4, "of files without an index, each on the disk is read"


def test_a_run_from_before_the_index_has_the_same_table(run):
    def table() -> list[dict]:
        names = (
            "file, number, grp, key, env, outcome, why, reward, success, turns, tokens, split, retries, text"
        )
        return index_of(run).query(f"SELECT {names} FROM rollouts ORDER BY file, number")

    indexed = table()
    (run / "rollouts" / "index.jsonl").unlink()
    assert table() == indexed
    with served(run) as viewer:
        assert viewer.get(f"{viewer.root}rollout/step-000002/3").status == 200


def test_advantages_and_ratios_come_from_the_trainers_files(run):
    record = {"number": 1, "advantage": -0.5, "trained": 3, "logprobs": [-0.001, -0.7, -3.0], "weights": 0.9}
    frame = zstandard.compress(json.dumps(record).encode() + b"\n")
    (run / "rollouts" / "step-000001.train.jsonl.zst").write_bytes(frame)
    row = {"file": "step-000001", "number": 1, "offset": 0, "length": len(frame), "line": 0}
    row |= {"advantage": -0.5, "trained": 3, "ratio_max": 2.7183}
    (run / "rollouts" / "train_index.jsonl").write_text(json.dumps(row) + "\n")
    with served(run) as viewer:
        text = viewer.get(f"{viewer.root}rollout/step-000001/1/tokens?heat=ratio").text
        rollouts = viewer.get(f"{viewer.root}rollouts?sort=ratio&order=down").text
        without = viewer.get(f"{viewer.root}rollout/step-000001/0/tokens?heat=ratio").text
    assert "advantage -0.500" in text and "3 trained" in text
    assert 'data-t="2;-4.0000;-3.0000;2.7183;0.9000;0"' in text  # e to the power of 1
    assert "2.718" in rollouts and "has not recorded what the trainer made" in without


def test_directories_are_named_in_urls_and_told_apart(tmp_path):
    paths = [tmp_path / name / "a" / "seed 0" for name in ("x", "y")]
    for path in paths:
        write_run(path)
    assert list(runs_at(paths, None)) == ["a.seed_0", "a.seed_0.2"]
    with pytest.raises(RunDirectoryError, match="has neither"):
        runs_at([tmp_path], None)
    sweep = tmp_path / "sweep"
    for job in ("10", "2"):
        write_run(sweep / job)
    (sweep / "sweep.json").write_text("{}")
    assert [run.path.name for run in runs_at([sweep], None).values()] == ["2", "10"]
    with served(sweep) as viewer:
        text = viewer.get("/").text
        assert "2 runs" in text and "/r/sweep.10/" in text
        assert viewer.get("/r/sweep.2/compare?with=sweep.10").status == 200
