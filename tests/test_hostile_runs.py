"""The run directory of a stranger: commands show its texts as text, read nothing beside it, and end."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import zstandard
from exported_run import write_run
from viewed_runs import EVIL, LONG, OBEYED, played, served
from written_runs import write_run as write_job

from gymexp import rollouts, status
from gymexp.errors import GymexpError
from gymexp.evaluation.compare import compare
from gymexp.evaluation.plan import Plan, Policy
from gymexp.export.card import build_card
from gymexp.export.chosen import choose
from gymexp.export.folder import files_in, write_folder
from gymexp.printable import say, say_error
from gymexp.record import own_files
from gymexp.record.directory import RunDirectory
from gymexp.report.page import run_page
from gymexp.report.run_records import read_records
from gymexp.rollout.outcome import Completed
from gymexp.rollout.rollout_files import RolloutWriter, load_index
from gymexp.sweep import sweep_reader
from gymexp.sweep.page import results_html
from gymexp.sweep.table import results_csv, results_table, rows_of
from gymexp.view import run_text
from gymexp.view.progress import View

SECRET = "actually-private-text"
MOST_S = 20.0  # of a command, on a busy machine; without bounds these take minutes or for ever


@pytest.fixture
def run(tmp_path) -> Path:
    """A run whose policy, environments, processes and errors wrote all that a reader could obey."""
    run = write_run(tmp_path / "outputs" / "demo")
    directory = RunDirectory(run)
    writer = RolloutWriter(run / "rollouts", choose(run, "last").config.env, last_step=4)
    call = {"type": "function_call", "name": EVIL, "arguments": json.dumps({"who": EVIL})}
    output = {"type": "function_call_output", "output": EVIL}
    items = [call, output, {"role": EVIL, "content": EVIL}, {"role": "assistant", "content": EVIL + LONG}]
    evil = played("office/train/1", 0.5, items=items, verdict={EVIL: EVIL, "long": LONG}, replica=EVIL)
    writer.write("step-000005", [Completed(evil, [EVIL]), Completed(evil)], 2)
    directory.write_error(EVIL)
    (run / "status.json").write_text(
        json.dumps({"ended": "failed", "outcome": EVIL, "host": EVIL, "phase": EVIL, "node": EVIL})
    )
    (run / "versions.txt").write_text(f"{EVIL} {EVIL}\ntorch {EVIL}\n")
    (run / "logs").mkdir(exist_ok=True)
    (run / "logs" / "office.log").write_text(f"ready {EVIL}\n{LONG}\nERROR {EVIL}\n", errors="replace")
    (run / "timeline.jsonl").write_text(json.dumps({"time": 1.8e9, "event": EVIL, "why": EVIL}) + "\n")
    return run


class Page(HTMLParser):
    """What a browser would run of a page, and the page's texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.run: list[str] = []
        self.texts: list[str] = []
        self._is_script = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._is_script = tag == "script" and ("type", "application/json") not in attrs
        self.run += [tag for tag in [tag] if tag in ("img", "iframe", "object", "base", "embed")]
        self.run += [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag):
        self._is_script = False

    def handle_data(self, data):
        if self._is_script:
            self.run += ["alert"] if "alert(" in data else []
        else:
            self.texts.append(data)


def command(main: Callable[[], None], *arguments: object) -> None:
    """Runs a command as `guarded` does."""
    sys.argv = ["gymexp", *map(str, arguments)]
    try:
        main()
    except GymexpError as error:
        say_error(error)


def show_sweep(run: Path) -> None:
    sweep = sweep_reader.read_sweep(_sweep_of(run))
    say(results_table(rows_of(sweep), sweep.keys))
    say(results_csv(rows_of(sweep), sweep.keys))
    command(status.main, sweep.path)


def _sweep_of(run: Path) -> Path:
    sweep = run.parent / "sweep"
    if not sweep.exists():
        name = EVIL.replace("\U000e0041", "")  # YAML has no escape in JSON's form for it
        overrides = [json.dumps(f"trainer.run_name={name}")]
        write_job(sweep / "0", overrides, outcome="failed", result={"error": EVIL})
        write_job(sweep / "1", ["trainer.run_name==1+1"], services={EVIL: EVIL}, phase=EVIL)
    return sweep


def follow(run: Path) -> None:
    run_text.follow(run, View(sys.stdout), sleep=lambda _: None)


def compared(run: Path) -> None:
    policies = [Policy("model", f"{EVIL}{n}", "eval-000004") for n in range(2)]
    Plan(policies, 1, "validation").write(run)
    keys = {row["key"]: "hash" for row in load_index(run / "rollouts")}
    (run / "tasks.json").write_text(json.dumps(keys))
    say(compare([str(run)]))


SHOWN = {
    "rollouts": lambda run: command(rollouts.main, run),
    "rollouts of a step": lambda run: command(rollouts.main, run, "--step", 5),
    "one rollout": lambda run: command(rollouts.main, run, "--step", 5, "--number", 0, "--full"),
    "a failed one": lambda run: command(rollouts.main, run, "--eval", 4, "--number", 0),
    "a wrong argument": lambda run: command(rollouts.main, run, "--env", EVIL),
    "status": lambda run: command(status.main, run),
    "status of a sweep": show_sweep,
    "the logs followed": follow,
    "compare": compared,
    "the card": lambda run: sys.stdout.write(card(run)),
    "the file names": lambda run: [say(name) for name in files_in(run)],
}


def card(run: Path) -> str:
    (run / "result.json").write_text(json.dumps({"step": 4, "stopped": False, "why": EVIL}))
    return build_card(choose(run, "last"), "ann/policy", False, True, {EVIL}, False)


@pytest.mark.parametrize("name", SHOWN)
def test_no_command_writes_what_a_terminal_would_obey(run, capsys, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    began = time.monotonic()
    SHOWN[name](run)
    text = "".join(capsys.readouterr())
    assert text and not ({*OBEYED, "\r", "\x7f"} & set(text))
    assert "Traceback" not in text and time.monotonic() - began < MOST_S


PAGES = {
    "report": lambda run: run_page(read_records(run)),
    "page of a sweep": lambda run: _results_html(_sweep_of(run)),
}


def _results_html(path: Path) -> str:
    sweep = sweep_reader.read_sweep(path)
    return results_html(sweep, rows_of(sweep))


@pytest.mark.parametrize("name", PAGES)
def test_no_page_has_it_as_anything_but_text(run, name):
    began = time.monotonic()
    text = PAGES[name](run)
    page = Page(text)
    assert page.run == [] and not OBEYED & set(text)
    assert "<script>alert(1)</script>" in "".join(page.texts), "as text it is there"
    assert time.monotonic() - began < MOST_S


def test_no_file_of_an_export_has_it_and_the_card_has_no_markup_of_theirs(run, tmp_path, monkeypatch):
    (run / "result.json").write_text(json.dumps({"step": 4, "stopped": False, "why": EVIL}))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("agent: office_agent", "agent: '<b>x</b>|`{{ 7*7 }}'"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, EVIL: EVIL, "=1+1": "=1+1"}) + "\n")
    write_folder(choose(run, "last"), tmp_path / "policy", adapter=False, name=None)
    for name in files_in(tmp_path / "policy"):
        if not name.endswith(".safetensors") and not name.startswith("tokenizer"):
            text = (tmp_path / "policy" / name).read_text()
            assert not ({*OBEYED, "\r"} & set(text)), name
    readme = (tmp_path / "policy" / "README.md").read_text()
    assert "agent `<b>x</b>/'{{ 7*7 }}`" in readme, "code is text, and has no end but its own"
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", readme, flags=re.DOTALL)
    assert not re.search("<[a-z/!]", outside)
    assert "'=1+1" in (tmp_path / "policy" / "gymexp" / "metrics.csv").read_text()


def view(run: Path) -> None:
    with served(run) as viewer:
        for page in ("", "config", "rollouts", "rollout/step-000004/0", "step/step-000004", "compare"):
            answer = viewer.get(viewer.root + page)
            assert answer.status in (200, 404, 409), answer.text[-500:]
            sys.stdout.write(answer.text)


def export(run: Path) -> None:
    def main() -> None:
        to = run.parent / "policy"
        write_folder(choose(run, "last"), to, adapter=False, name=None)
        for name in files_in(to):
            sys.stdout.write((to / name).read_text(errors="replace"))

    command(main)


READERS: dict[str, Callable[[Path], object]] = {
    "rollouts": SHOWN["rollouts"],
    "one rollout": lambda run: command(rollouts.main, run, "--step", 4, "--number", 0),
    "status": SHOWN["status"],
    "compare": lambda run: command(lambda: say(compare([str(run), str(run)]))),
    "report": lambda run: command(lambda: sys.stdout.write(run_page(read_records(run)))),
    "view": view,
    "export": export,
}
FILES = (
    "config.yaml", "overrides.yaml", "versions.txt", "status.json", "result.json", "metrics.jsonl",
    "timeline.jsonl", "data/train.jsonl", "data/mix.json", "rollouts/index.jsonl",
    "rollouts/step-000004.jsonl.zst", "logs/office.log", "model/tokenizer.json", "model/chat_template.jinja",
)  # fmt: skip


def link(name: str) -> Callable[[Path], None]:
    """Puts a link to a file outside of the run in place of one of its files."""

    def change(run: Path) -> None:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(run.parent / "private")

    return change


def in_index(**fields: object) -> Callable[[Path], None]:
    """Adds a line to the index, and makes it the newest step's only one."""

    def change(run: Path) -> None:
        path = run / "rollouts" / "index.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        with path.open("a") as file:
            file.write(json.dumps(rows[-1] | {"number": 999} | fields) + "\n")

    return change


def text_of(name: str, text: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).write_text(text)

    return change


def bomb(run: Path) -> None:
    path = run / "rollouts" / "index.jsonl"
    frame = zstandard.compress(b"x" * (64 << 20))
    for name in ("step-000004", "eval-000004"):
        (run / "rollouts" / f"{name}.jsonl.zst").write_bytes(frame)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    where = {"offset": 0, "length": len(frame), "line": 0}
    path.write_text("".join(json.dumps(row | where) + "\n" for row in rows))


def pipe(run: Path) -> None:
    (run / "versions.txt").unlink()
    os.mkfifo(run / "versions.txt")


def secret_in_config(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("name: demo", "name: ${oc.env:STRANGE_WORD}"))


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
ALIASES = "a: &a [x, x]\n" + "".join(f"a{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}]\n" for i in range(9))
ATTACKS: dict[str, Callable[[Path], None]] = {
    **{f"link {name}": link(name) for name in FILES},
    "path up": in_index(file="../../private"),
    "absolute path": in_index(file="/etc/passwd"),
    "far offset": in_index(offset=1 << 62, length=1 << 62),
    "strange types": in_index(reward="x", key=7, env=["x"], text=None, seconds=[1], failures={}),
    "bomb": bomb,
    "pipe": pipe,
    "deep status": text_of("status.json", DEEP),
    "deep result": text_of("result.json", DEEP),
    "deep metrics": text_of("metrics.jsonl", DEEP + "\n"),
    "deep index": text_of("rollouts/index.jsonl", DEEP + "\n"),
    "deep tasks": text_of("data/train.jsonl", DEEP + "\n"),
    "deep config": text_of("config.yaml", "a: " + "[" * 100_000),
    "aliases": text_of("config.yaml", ALIASES),
    "code in config": text_of("config.yaml", "!!python/object/apply:os.system ['touch ran']"),
    "variable in config": secret_in_config,
    "variable in overrides": text_of("overrides.yaml", "- name=${oc.env:STRANGE_WORD}\n"),
    "odd tokenizer": text_of("model/tokenizer.json", '{"model": {"type": "BPE", "vocab": 7}}'),
    "deep tokenizer": text_of("model/tokenizer.json", DEEP),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_command_reads_anything_else_or_fails_without_words(tmp_path, capsys, monkeypatch, attack):
    monkeypatch.setattr(own_files, "MAX_FRAME", 1 << 20)
    monkeypatch.setenv("STRANGE_WORD", SECRET)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private").write_text(SECRET)
    (tmp_path / "private.jsonl.zst").write_bytes(zstandard.compress(SECRET.encode()))
    run = write_run(tmp_path / "demo")
    ATTACKS[attack](run)
    for name, read in READERS.items():
        began = time.monotonic()
        read(run)
        assert time.monotonic() - began < MOST_S, name
        assert SECRET not in "".join(capsys.readouterr()), name
    assert not (tmp_path / "ran").exists()
    if attack.startswith("link") and "tokenizer" not in attack and "chat" not in attack:
        status_only = attack.endswith((".zst", "mix.json"))
        command(status.main, run)
        assert ("leads out of it" in capsys.readouterr().err) or status_only
