import json
import os
import threading
from pathlib import Path

import pytest

from gymexp.config.schema import DataConfig, EnvConfig
from gymexp.data import cache as cache_module
from gymexp.data import generate as generate_module
from gymexp.data.cache import cached, sha256_of
from gymexp.data.sources import fetch
from gymexp.errors import DataError


def ignore(_: str) -> None: ...


def write_rows(directory: Path) -> None:
    (directory / "train.jsonl").write_text("{}\n")


def test_the_users_own_files_are_taken_where_they_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("{}\n")
    env = EnvConfig("", "a", data=DataConfig("jsonl", train_file="mine.jsonl", validation_file="mine.jsonl"))
    files = fetch("mine", env, None, tmp_path / "cache", ignore)
    assert files.train == Path("mine.jsonl") and files.train_sha256 == sha256_of(Path("mine.jsonl"))
    assert not (tmp_path / "cache").exists()


def test_a_missing_own_file_is_said_with_key_and_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = EnvConfig("", "a", data=DataConfig("jsonl", train_file="none.jsonl", validation_file="none.jsonl"))
    with pytest.raises(
        DataError, match=r"env\.mine\.data\.train_file must be a JSONL file, but none\.jsonl does not"
    ):
        fetch("mine", env, None, tmp_path, ignore)


def test_an_entry_is_made_once_and_named_by_what_determines_it(tmp_path):
    made: list[Path] = []

    def make(directory: Path) -> None:
        made.append(directory)
        write_rows(directory)

    one = cached(tmp_path, "sudoku", {"seed": 1}, make, ignore)
    assert cached(tmp_path, "sudoku", {"seed": 1}, make, ignore) == one
    assert cached(tmp_path, "sudoku", {"seed": 2}, make, ignore) != one
    assert len(made) == 2 and one[1] == {"train.jsonl": sha256_of(one[0] / "train.jsonl")}


@pytest.mark.parametrize("damage", ["changed", "missing file", "missing index", "broken index"])
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    entry, hashes = cached(tmp_path, "sudoku", {}, write_rows, ignore)
    match damage:
        case "changed":
            (entry / "train.jsonl").write_text("{}")
        case "missing file":
            (entry / "train.jsonl").unlink()
        case "missing index":
            (entry / "entry.json").unlink()
        case "broken index":
            (entry / "entry.json").write_text("[")
    said: list[str] = []
    assert cached(tmp_path, "sudoku", {}, write_rows, said.append) == (entry, hashes)
    assert (entry / "train.jsonl").read_text() == "{}\n" and "damaged" in said[0]


def test_a_failed_making_leaves_nothing_behind(tmp_path):
    def fail(directory: Path) -> None:
        write_rows(directory)
        raise DataError("no")

    with pytest.raises(DataError):
        cached(tmp_path, "sudoku", {}, fail, ignore)
    assert [path.suffix for path in (tmp_path / "data").iterdir()] == [".lock"]


def test_what_a_killed_run_left_is_no_part_of_the_entry(tmp_path):
    entry, _ = cached(tmp_path, "sudoku", {}, write_rows, ignore)
    part = entry.rename(entry.with_name(f".{entry.name}.part"))
    (part / "half.jsonl").touch()
    cached(tmp_path, "sudoku", {}, write_rows, ignore)
    assert {file.name for file in entry.iterdir()} == {"train.jsonl", "entry.json"} and not part.exists()


def test_two_runs_at_once_make_an_entry_once(tmp_path):
    made, said = [], []
    begun, go_on = threading.Event(), threading.Event()

    def make(directory: Path) -> None:
        made.append(directory)
        begun.set()
        assert go_on.wait(10)
        write_rows(directory)

    def say(line: str) -> None:
        said.append(line)
        go_on.set()  # the second run has met the lock

    first = threading.Thread(target=cached, args=(tmp_path, "sudoku", {}, make, ignore))
    first.start()
    assert begun.wait(10)
    cached(tmp_path, "sudoku", {}, make, say)
    first.join()
    assert len(made) == 1 and "another run is making this data" in said[0]


def test_a_lock_held_for_too_long_ends_the_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_LOCK_TIMEOUT_S", 0.2)
    begun, go_on = threading.Event(), threading.Event()

    def make(directory: Path) -> None:
        begun.set()
        assert go_on.wait(10)

    first = threading.Thread(target=cached, args=(tmp_path, "sudoku", {}, make, ignore))
    first.start()
    assert begun.wait(10)
    with pytest.raises(DataError, match="another process has held"):
        cached(tmp_path, "sudoku", {}, make, ignore)
    go_on.set()
    first.join()


# What stands where reasoning_gym's create_dataset.py would; `config` says how it misbehaves.
FAKE_SCRIPT = """
import argparse, json, os, sys, time
p = argparse.ArgumentParser()
for name in ("--task", "--size", "--seed", "--config", "--output"):
    p.add_argument(name)
a = p.parse_args()
config = json.loads(a.config)
print("making", a.size, "puzzles")
if config.get("sleep"):
    open(a.output + ".pid", "w").write(str(os.getpid()))
    time.sleep(60)
if config.get("fail"):
    sys.exit("no such task")
with open(a.output, "w") as file:
    for i in range(int(a.seed), int(a.seed) + int(a.size)):
        question = str(i % config.get("kinds", 10**9))
        row = {"responses_create_params": {"input": question}, "agent_ref": {"name": "theirs"}}
        row["question"] = question
        file.write(json.dumps(row) + "\\n")
"""


@pytest.fixture
def fake_gym(tmp_path, monkeypatch):
    script = tmp_path / "site" / "resources_servers/reasoning_gym/scripts/create_dataset.py"
    script.parent.mkdir(parents=True)
    script.write_text(FAKE_SCRIPT)
    monkeypatch.setattr(generate_module, "site_packages", lambda python: tmp_path / "site")
    monkeypatch.setattr(generate_module, "versions", lambda python, packages: {})
    return Path(os.sys.executable)


def puzzles(**changes) -> EnvConfig:
    said = {"options": {"task": "count"}, "train_size": 40, "train_seed": 42}
    said |= {"validation_size": 10, "validation_seed": 24} | changes
    return EnvConfig("", "a", data=DataConfig("generate", "reasoning_gym", **said))


def questions(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert not any("agent_ref" in row for row in rows)
    return [row["question"] for row in rows]


def made(fake_gym, tmp_path, said=None, **changes) -> tuple[list[str], list[str]]:
    said = [] if said is None else said
    files = fetch("sudoku", puzzles(**changes), fake_gym, tmp_path / "cache", said.append)
    return questions(files.train), questions(files.validation)


def test_validation_seeds_apart_from_the_train_seeds_are_kept(fake_gym, tmp_path):
    train, validation = made(fake_gym, tmp_path, validation_seed=1000)
    assert train == [str(n) for n in range(42, 82)] and validation == [str(n) for n in range(1000, 1010)]


@pytest.mark.parametrize("validation_seed", [33, 42, 60, 81])
def test_validation_seeds_that_meet_the_train_seeds_start_after_them(fake_gym, tmp_path, validation_seed):
    said: list[str] = []
    train, validation = made(fake_gym, tmp_path, said, validation_seed=validation_seed)
    assert len(validation) == 10 and not set(train) & set(validation)
    assert any("validation starts at seed 82" in line for line in said)


def test_validation_puzzles_that_the_train_set_holds_are_replaced(fake_gym, tmp_path):
    config = {"task": "count", "config": {"kinds": 60}}
    train, validation = made(fake_gym, tmp_path, options=config, validation_seed=96)  # 36…59, 0, 1, 2, …
    assert len(set(validation)) == 10 and not set(train) & set(validation)


def test_too_few_different_puzzles_are_an_error_with_the_ways_on(fake_gym, tmp_path):
    with pytest.raises(DataError, match=r"contained only 5 that are not train tasks: lower it"):
        made(fake_gym, tmp_path, options={"task": "count", "config": {"kinds": 45}})


@pytest.mark.parametrize(
    "change", [{"train_seed": 1}, {"validation_size": 11}, {"options": {"task": "other"}}]
)
def test_another_seed_size_or_option_is_another_entry(fake_gym, tmp_path, change):
    before = fetch("sudoku", puzzles(), fake_gym, tmp_path, ignore)
    assert fetch("sudoku", puzzles(**change), fake_gym, tmp_path, ignore).train.parent != before.train.parent
    assert fetch("sudoku", puzzles(), fake_gym, tmp_path, ignore) == before


def test_another_generator_script_is_another_entry(fake_gym, tmp_path):
    before = fetch("sudoku", puzzles(), fake_gym, tmp_path, ignore)
    script = tmp_path / "site" / "resources_servers/reasoning_gym/scripts/create_dataset.py"
    script.write_text(script.read_text() + "# changed\n")
    assert fetch("sudoku", puzzles(), fake_gym, tmp_path, ignore).train.parent != before.train.parent


def test_a_failing_generator_is_shown_with_its_last_words(fake_gym, tmp_path):
    with pytest.raises(
        DataError, match=r"env\.sudoku\.data: the generator ended with code 1:(\n.*)*no such task"
    ):
        made(fake_gym, tmp_path, options={"task": "count", "config": {"fail": True}})


def test_a_generator_that_hangs_is_ended(fake_gym, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_module, "_DEADLINE_S", 2.0)
    pids: list[int] = []
    original = generate_module._run_all

    def run_all(*args, **kwargs):
        try:
            original(*args, **kwargs)
        finally:
            pids.extend(int(file.read_text()) for file in (tmp_path / "cache").rglob("*.pid"))

    monkeypatch.setattr(generate_module, "_run_all", run_all)
    with pytest.raises(DataError, match="not done after 2 s"):
        made(fake_gym, tmp_path, options={"task": "count", "config": {"sleep": True}})
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("options", [{}, {"task": "count", "confg": {}}])
def test_wrong_generator_options_are_refused(fake_gym, tmp_path, options):
    with pytest.raises(DataError, match=r"env\.sudoku\.data\.options must be"):
        made(fake_gym, tmp_path, options=options)
