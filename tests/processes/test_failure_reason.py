"""What is told of a log: the reason of an end, not what happens to stand last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gymexp.processes.failure_reason import reason

# Each a program, and what is to be told of what it prints; `{at}` is its file.
PROGRAMS = {
    "plain": ("print('starting')\nraise ValueError('out of order')", "ValueError: out of order ({at}:2)"),
    "without a message": ("raise KeyboardInterrupt", "KeyboardInterrupt ({at}:1)"),
    "a missing module": (
        "import no_such_module",
        "ModuleNotFoundError: No module named 'no_such_module' ({at}:1)",
    ),
    "a YAML dump behind it": (
        "import traceback\ntry:\n    {}['key']\nexcept KeyError:\n    traceback.print_exc()\n"
        "import sys; print('config:\\n' + '  a: b\\n' * 40, file=sys.stderr); sys.exit(1)",
        "KeyError: 'key' ({at}:3)",
    ),
    "a warning behind it": (
        "import atexit, warnings\natexit.register(lambda: warnings.warn('old', FutureWarning))\n1 / 0",
        "ZeroDivisionError: division by zero ({at}:3)",
    ),
    "raised from another": (
        "try:\n    open('/no/such/file')\nexcept OSError as error:\n    raise RuntimeError('x') from error",
        "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/file' ({at}:2)",
    ),
    "raised while another was handled": (
        "try:\n    {}['key']\nexcept KeyError:\n    raise RuntimeError('no such key')",
        "RuntimeError: no such key ({at}:4)",
    ),
    "behind a logger's prefix": (
        "import traceback\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n"
        "    for line in traceback.format_exc().splitlines():\n        print('(Core pid=7) ERROR ' + line)",
        "ZeroDivisionError: division by zero ({at}:3)",
    ),
    "as NeMo Gym prints it": (
        "import traceback\ntry:\n    1 / 0\nexcept ZeroDivisionError as e:\n"
        "    print(f'Formatted exception: {traceback.format_exc()}\\nrepr(e): {e!r}')",
        "ZeroDivisionError: division by zero ({at}:3)",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_exception_and_its_place_are_told(name, tmp_path):
    program, told = PROGRAMS[name]
    at, log = tmp_path / "program.py", tmp_path / "thing.log"
    at.write_text(program)
    with log.open("w") as out:
        subprocess.run([sys.executable, at], stdout=out, stderr=out, check=False, cwd="/")
    assert reason(log) == f"{told.format(at=at)}\nLook into {log}"


def test_of_a_validation_error_what_is_wrong_is_told_as_well(tmp_path):
    at, log = tmp_path / "program.py", tmp_path / "thing.log"
    at.write_text("import pydantic\nclass Row(pydantic.BaseModel):\n    level: int\nRow(level='high')\n")
    with log.open("w") as out:
        subprocess.run([sys.executable, at], stdout=out, stderr=out, check=False)
    first, second, third, *_ = reason(log).splitlines()
    assert first.startswith("pydantic_core._pydantic_core.ValidationError: 1 validation error for Row (")
    assert second == "  level" and third.startswith("  Input should be a valid integer")


def test_a_process_that_a_signal_ended_did_not_end_by_an_exception_that_it_had_caught(tmp_path):
    log = tmp_path / "thing.log"
    frames = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\n'
    log.write_text(f"{frames}ValueError: caught\nserving\nx.py:1: DeprecationWarning: old\n  f()\n")
    shown = reason(log, -9)
    assert shown.splitlines()[0] == f"The end of {log}:"
    assert "    serving" in shown.splitlines()
    assert "Traceback" not in shown and "Warning" not in shown and "File" not in shown


def test_the_end_of_a_log_is_shown_with_its_long_lines_cut(tmp_path: Path):
    log = tmp_path / "thing.log"
    log.write_bytes(b"x" * 1000 + b"\n\xff broken utf-8\nlast\n")
    shown = reason(log).splitlines()[1:]
    assert [len(line) for line in shown] == [304, 4 + len("� broken utf-8"), 8]
    assert reason(tmp_path / "none.log") == f"{tmp_path / 'none.log'} is empty"
