"""A run's folder behind a link to another disk is read like any other; a stranger's link is not followed."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from exported_run import write_run
from viewed_runs import served

from gymexp import rollouts, status
from gymexp.config.schema import CheckpointConfig
from gymexp.errors import GymexpError, RunDirectoryError
from gymexp.export.__main__ import main as export
from gymexp.export.chosen import choose
from gymexp.record import linked_folders
from gymexp.record.directory import RunDirectory
from gymexp.record.own_files import check_own
from gymexp.report.page import run_page
from gymexp.report.run_records import read_records
from gymexp.training import checkpoints
from gymexp.view.run_files import RunFiles

FOLDERS = ("checkpoints", "rollouts", "logs", "data", "model")


def a_run(path: Path) -> Path:
    """A finished run as gymexp makes it, with checkpoints of the steps 2 and 3."""
    write_run(path)
    for step in (2, 3):
        checkpoint = path / "checkpoints" / f"checkpoint-{step}"
        shutil.copytree(path / "model", checkpoint)
        checkpoints.seal(checkpoint)
    (path / "logs").mkdir()
    (path / "logs" / "trainer.log").write_text("a line of the trainer\n")
    linked_folders.mark(path, [path / name for name in FOLDERS])
    return path


def put_elsewhere(run: Path, name: str) -> Path:
    """Moves a folder of the run to another place and leaves a link. Returns that place."""
    place = run.parent / f"big-disk-of-{run.name}" / name
    place.parent.mkdir(exist_ok=True)
    shutil.move(run / name, place)
    (run / name).symlink_to(place)
    return place


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(sys, "argv", [])
    return a_run(tmp_path / "mine")


def export_policy(run: Path, step: str) -> None:
    to = run.parent / "exported"
    sys.argv = ["export", str(run), "--to", str(to), "--checkpoint", step]
    export()
    print(sorted((path.name, path.read_bytes()) for path in to.iterdir() if path.is_file()))
    shutil.rmtree(to)


def export_rollouts(run: Path) -> None:
    to = run.parent / "rollouts.jsonl"
    sys.argv = ["export", str(run), "--gym", str(to)]
    export()
    print(to.read_text())


def view(run: Path) -> None:
    with served(run) as viewer:
        for page in (
            "",
            "rollouts",
            "rollout/step-000004/0",
            "rollout/step-000004/0/tokens",
            "log/trainer.log",
        ):
            answer = viewer.get(viewer.root + page)
            print(answer.status, answer.text.replace(viewer.root, ""))


def command(main: Callable[[], None], *arguments: object) -> None:
    sys.argv = ["gymexp", *map(str, arguments)]
    main()


READERS: dict[str, Callable[[Path], None]] = {
    "export a checkpoint": lambda run: export_policy(run, "2"),
    "export the final policy": lambda run: export_policy(run, "last"),
    "export rollouts": export_rollouts,
    "status": lambda run: command(status.main, run),
    "rollouts": lambda run: command(rollouts.main, run, "--step", 4, "--number", 0),
    "report": lambda run: print(re.sub(r"\d\d:\d\d:\d\d UTC", "", run_page(read_records(run)))),
    "view": view,
}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_command_says_of_a_moved_folder_what_it_said_before(run, name, capsys):
    def said() -> dict[str, str]:
        return {reader: (read(run), capsys.readouterr().out)[1] for reader, read in READERS.items()}

    before = said()
    put_elsewhere(run, name)
    after = said()
    assert all(before.values())
    for reader in READERS:
        assert after[reader] == before[reader], reader


def no_words(mine: Path, theirs: Path) -> None:
    for folder in (mine, theirs):
        (folder / "run_id").unlink(missing_ok=True)


def empty_words(mine: Path, theirs: Path) -> None:
    for folder in (mine, theirs):
        (folder / "run_id").write_text("\n")


def link_to_the_word(mine: Path, theirs: Path) -> None:
    (mine / "run_id").unlink()
    (mine / "run_id").symlink_to(theirs / "run_id")


def pipe(mine: Path, theirs: Path) -> None:
    (mine / "run_id").unlink()
    os.mkfifo(mine / "run_id")


FORGED: dict[str, Callable[[Path, Path], None]] = {
    "another run's word": lambda mine, theirs: None,
    "no words": no_words,
    "empty words": empty_words,
    "a link to the word": link_to_the_word,
    "a pipe": pipe,
}


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_link_to_a_folder_of_another_run_is_refused(run, tmp_path, name, forged):
    private = put_elsewhere(a_run(tmp_path / "private"), name)
    shutil.rmtree(run / name)
    (run / name).symlink_to(private)
    FORGED[forged](run, private)
    step = "2" if name == "checkpoints" else "last"
    with pytest.raises(RunDirectoryError, match=rf"but {name} is a link that leads out of it, to {private}"):
        choose(run, step)
    suffixes = ("log", "zst", "json")
    assert [found for suffix in suffixes for found in RunFiles(run).names(name, suffix)] == []
    assert RunFiles(run).folders(name) == []


def test_what_the_refusal_says_makes_the_folder_the_runs_own(run, tmp_path):
    place = put_elsewhere(run, "rollouts")
    (place / "run_id").unlink()
    with pytest.raises(RunDirectoryError) as refused:
        check_own(run)
    advice = str(refused.value).partition("this run's own: ")[2]
    assert advice == f"cp {run}/run_id {place}/"
    assert os.system(advice) == 0
    check_own(run)
    no_words(run, place)
    with pytest.raises(RunDirectoryError, match="write the same word into") as refused:
        check_own(run)
    for path in str(refused.value).partition("into ")[2].split(" and into "):
        Path(path).write_text("mine\n")
    check_own(run)


def test_a_single_checkpoint_may_lie_elsewhere_and_is_never_deleted(run):
    place = run.parent / "old-checkpoint"
    shutil.move(run / "checkpoints" / "checkpoint-2", place)
    (run / "checkpoints" / "checkpoint-2").symlink_to(place)
    with pytest.raises(GymexpError, match=r"checkpoints/checkpoint-2 is a link that leads out of it"):
        choose(run, "2")
    shutil.copy(run / "run_id", place)
    assert choose(run, "2").step == 2
    checkpoints.prune(run / "checkpoints", CheckpointConfig(keep_last=1), {})
    assert sorted(checkpoints.all_of(run / "checkpoints")) == [2, 3] and (place / "complete.json").exists()


def test_a_run_begins_in_a_directory_whose_folders_are_links_to_empty_ones(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoints", "rollouts"):
        (tmp_path / "big" / name).mkdir(parents=True)
        (run / name).symlink_to(tmp_path / "big" / name)
    claimed = RunDirectory.claim(run)
    (claimed.rollouts / "index.jsonl").write_text("")
    assert (tmp_path / "big" / "rollouts" / "index.jsonl").exists()
    check_own(run)


def test_a_folder_with_files_behind_a_link_is_no_place_for_a_new_run(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rollouts").symlink_to(tmp_path / "big")
    with pytest.raises(RunDirectoryError, match="has rollouts: choose another output_dir"):
        RunDirectory.claim(tmp_path / "run")


@pytest.mark.parametrize("name", ["checkpoints", "rollouts", "checkpoints/checkpoint-3"])
def test_a_run_is_not_resumed_without_the_disk_that_has_its_folder(run, name):
    """Without its checkpoints a resumed run would begin anew."""
    place = run.parent / "big"
    shutil.move(run / name, place)
    (run / name).symlink_to(place)
    place.rename(run.parent / "unmounted")
    with pytest.raises(RunDirectoryError, match=rf"{name} must be a folder, but is a link to {place}, which"):
        RunDirectory.reopen(run)
    (run.parent / "unmounted").rename(place)
    RunDirectory.reopen(run)


def test_a_resumed_run_of_an_earlier_version_marks_its_own_folders_and_no_linked_one(run):
    for path in run.rglob("run_id"):
        path.unlink()
    place = put_elsewhere(run, "rollouts")
    RunDirectory.reopen(run)
    assert not (place / "run_id").exists(), "what lies behind a link may be another run's"
    assert (run / "checkpoints" / "run_id").read_text() == (run / "run_id").read_text()
    assert len((run / "run_id").read_text()) > 30
