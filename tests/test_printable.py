"""No text of others reaches a terminal as anything but text."""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gymexp import printable as module
from gymexp.files import append_line, read_lines
from gymexp.printable import csv_cell, printable, printable_in
from gymexp.processes.failure_reason import reason
from gymexp.record.directory import RunDirectory
from gymexp.view.progress import View
from gymexp.view.run_text import Tail

ROOT = Path(__file__).parent.parent
EVIL = (
    "\x1b]0;owned\x07\x1b[2J\x9b31m\x1b]52;c;ZXZpbA==\x1b\\ \u202egnp.exe\u2066\rover\x08\x00\x7f\u2028\ud800"
)
PLAIN = (
    r"\x1b]0;owned\x07\x1b[2J\x9b31m\x1b]52;c;ZXZpbA==\x1b\ "
    r"\u202egnp.exe\u2066\rover\x08\x00\x7f\u2028\ud800"
)
TAGS = "".join(chr(0xE0000 + ord(c)) for c in "ignore all")  # seen by a model alone
HARMLESS = "naïve 東京 → שלום\tمرحبا 👩\u200d🔬\n"
DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def fit(text: str) -> bool:
    """By Unicode's own classes: no control but newline and tab, no half of a pair, no change of direction."""
    kinds = {unicodedata.category(c) for c in text if c not in "\n\t"}
    return not kinds & {"Cc", "Cs", "Zl", "Zp"} and not {*map(unicodedata.bidirectional, text)} & {
        *DIRECTIONS
    }


def test_what_a_terminal_would_obey_is_shown_instead():
    assert printable(EVIL) == PLAIN
    assert printable(TAGS).startswith(r"\U000e0069\U000e0067")


@given(st.text(st.characters(codec=None, categories=None)))
def test_nothing_unfit_is_left_and_plain_text_stays_as_it_is(text):
    assert fit(printable(text))
    assert printable(printable(text)) == printable(text)
    assert (
        printable("naïve 東京 → שלום\tمرحبا 👩‍🔬\n" + "a\r\nb") == "naïve 東京 → שלום\tمرحبا 👩‍🔬\n" + "a\nb"
    )


def test_the_view_prints_nothing_that_it_was_told_raw():
    for is_terminal in (False, True):
        stream = io.StringIO()
        stream.isatty = lambda is_terminal=is_terminal: is_terminal  # type: ignore[method-assign]
        view = View(stream)
        view.say(EVIL)
        view.update({"phase": EVIL})
        assert PLAIN in stream.getvalue() and fit(stream.getvalue())


def test_what_a_run_writes_down_of_others_is_printable_in_each_file(tmp_path):
    run = RunDirectory(tmp_path)
    append_line(run.timeline, {"phase": EVIL})
    run.write_status(outcome=EVIL, services={EVIL: "ready"})
    run.write_error(EVIL)
    assert read_lines(run.timeline) == [{"phase": PLAIN}]
    assert json.loads(run.status.read_text()) == {"outcome": PLAIN, "services": {PLAIN: "ready"}}
    assert run.read_result() == {"error": PLAIN}
    assert printable_in([1, None, {"a": [EVIL]}]) == [1, None, {"a": [PLAIN]}]


def test_the_end_of_a_servers_log_is_printable(tmp_path):
    (tmp_path / "server.log").write_bytes(EVIL.encode(errors="replace") + b"\n")
    said = reason(tmp_path / "server.log")
    assert fit(said) and r"\x1b]0;owned" in said


def test_of_a_line_that_was_written_over_the_last_state_is_followed(tmp_path):
    (tmp_path / "a.log").write_bytes(b"")
    tail = Tail(tmp_path)
    (tmp_path / "a.log").write_bytes(b"10%\r50%\r100%\r\nnext\n")
    assert list(tail.lines()) == [("a", "100%"), ("a", "next")]


def test_the_log_is_printable(monkeypatch):
    stream, root = io.StringIO(), logging.Logger("of its own")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logging, "root", root)
    module.log_to_stderr("%(message)s")
    try:
        raise ValueError(EVIL)
    except ValueError:
        root.exception("%s", EVIL)
    assert stream.getvalue().startswith(PLAIN) and fit(stream.getvalue())


def test_a_cell_of_a_csv_file_is_text_or_a_number_and_no_formula():
    texts = ("=1+1", "+a", "-a", "@x", "\tx", "x=1", "-1e-5", "+2", "-1+cmd|'x'!A", "\x1b=")
    cells = ["'=1+1", "'+a", "'-a", "'@x", "'\tx", "x=1", "-1e-5", "+2", "'-1+cmd|'x'!A", "\\x1b="]
    assert [csv_cell(text) for text in texts] == cells
    assert csv_cell(-1.5) == -1.5 and csv_cell(None) is None


# Say what they made themselves: JSON for another process, sizes, what a program's own user typed.
OWN = {
    "gymexp/printable.py",
    "gymexp/cli/entry.py",
    "gymexp/training/argument_trial.py",
    "gymexp/gateway/prompt_lengths.py",
    "gymexp/gateway/tokenizer_check.py",
    "gymexp/cli/reference.py",
    "gymexp/doctor/disk_probe.py",
    "gymexp/evaluation/whole_model.py",
    "gymexp/data/workplace/make.py",
    "gymexp/sweep/slurm.py",
}


@pytest.mark.parametrize("path", sorted((ROOT / "gymexp").rglob("*.py")), ids=str)
def test_no_log_is_sent_anywhere_but_by_printable(path):
    """A library's warning may quote a server's answer."""
    calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
    assert path.name == "printable.py" or not calls & {"logging.basicConfig", "logging.StreamHandler"}


@pytest.mark.parametrize("path", sorted((ROOT / "gymexp").rglob("*.py")), ids=str)
def test_nothing_else_prints(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not prints or str(path.relative_to(ROOT)) in OWN, f"say it by printable.py: lines {prints}"
