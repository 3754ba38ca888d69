"""A module's answer comes from a process of its own, once; a failure names the task."""

from __future__ import annotations

import json

import pytest

from gymexp.errors import ConfigError
from gymexp.processes.module_call import call_module, call_module_once

ANSWER = "import json, sys; print('a library prints'); print(json.dumps({'got': json.load(sys.stdin)}))"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module `called` that Python finds."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))

    def write(code: str) -> list[str]:
        (tmp_path / "modules").mkdir(exist_ok=True)
        (tmp_path / "modules" / "called.py").write_text(code)
        return ["called"]

    return write


def test_the_last_line_is_the_answer_and_stdin_is_read_as_json(module):
    assert call_module(module(ANSWER), "looking", 60, stdin=[1, "é"]) == {"got": [1, "é"]}


def test_the_module_gets_its_arguments_and_no_variables_of_another_launcher(module, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    code = "import os, sys; print([len(sys.argv[1]), int(os.environ.get('WORLD_SIZE', 0))])"
    assert call_module([*module(code), "four"], "looking", 60) == [4, 0]


def test_a_failure_names_the_task_and_the_exception(module):
    with pytest.raises(ConfigError, match=r"^looking failed: KeyError: 'x' \(.*called\.py:1\)"):
        call_module(module("{}['x']"), "looking", 60)
    with pytest.raises(ConfigError, match=r"^looking failed: .*No module named gymexp\.nothing"):
        call_module(["gymexp.nothing"], "looking", 60)


def test_a_module_that_is_killed_says_so_and_foreign_bytes_do_no_harm(module):
    with pytest.raises(ConfigError, match=r"^looking failed: the process was ended by SIGKILL"):
        call_module(module("import os; os.kill(os.getpid(), 9)"), "looking", 60)
    noise = "import sys; sys.stderr.buffer.write(b'\\xff'); sys.stdout.buffer.write(b'\\xff\\n'); print(1)"
    assert call_module(module(noise), "looking", 60) == 1


def test_a_module_that_takes_too_long_is_given_up(module):
    with pytest.raises(ConfigError, match=r"^looking took more than 1 s"):
        call_module(module("import time; time.sleep(60)"), "looking", 1)


def test_an_answer_is_kept_whole_and_one_that_was_cut_short_is_made_again(module, tmp_path):
    kept = tmp_path / "answers" / "one.json"
    kept.parent.mkdir()
    kept.write_text('{"got": nu')
    for code in (ANSWER, "raise SystemExit('not run again')"):
        assert call_module_once(module(code), "looking", 60, kept) == {"got": None}
    assert [path.name for path in kept.parent.iterdir()] == ["one.json"]
    assert json.loads(kept.read_text()) == {"got": None}


def test_nothing_is_kept_of_a_failure(module, tmp_path):
    with pytest.raises(ConfigError):
        call_module_once(module("1 / 0"), "looking", 60, tmp_path / "two.json")
    assert not (tmp_path / "two.json").exists()
