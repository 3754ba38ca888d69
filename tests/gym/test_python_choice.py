"""NeMo Gym's Python: one that the wheel of the wanted version takes, wherever there is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gymexp.errors import ConfigError, ServiceError
from gymexp.gym.python_choice import find_python, required_python

# Stands in for uv: it unpacks a wheel with this Requires-Python, and fetches the Pythons that it is given.
FAKE_UV = """import pathlib, sys
words = sys.argv[1:]
with pathlib.Path({calls!r}).open("a") as file:
    file.write(" ".join(words) + "\\n")
if words[:2] == ["pip", "install"]:
    if not {required!r}:
        sys.exit("error: the index cannot be reached")
    info = pathlib.Path(words[words.index("--target") + 1], "nemo_gym-0.7.0.dist-info")
    info.mkdir()
    text = "Name: nemo-gym\\nRequires-Python: " + {required!r} + "\\n\\nText\\n"
    info.joinpath("METADATA").write_text(text)
elif "--managed-python" in words:
    print({fetched!r})
elif words[1] == "find" or not {fetched!r}:
    sys.exit("warning: no such Python\\n  cause: Name or service not known")
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with these Pythons on PATH and under pyenv, and this uv; gives the file of uv's calls."""

    def make(required: str, on_path=(), under_pyenv=(), fetched: str = "") -> Path:
        calls, uv, script = tmp_path / "calls", tmp_path / "uv", tmp_path / "uv.py"
        script.write_text(FAKE_UV.format(calls=str(calls), required=required, fetched=fetched))
        uv.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
        uv.chmod(0o755)
        monkeypatch.setattr("uv.find_uv_bin", lambda: str(uv))
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
        for version in on_path:
            interpreter(tmp_path / "bin" / f"python{version.rpartition('.')[0]}", f"echo {version}")
        for version in under_pyenv:
            body = "exit 1" if version == "3.13.19" else f"echo {version}"
            interpreter(tmp_path / "versions" / version / "bin" / "python", body)
        return calls

    return make


def interpreter(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("required", "on_path", "under_pyenv", "chosen"),
    [
        (">=3.12", ["3.11.7", "3.12.3"], [], "bin/python3.12"),
        (">=3.12", ["3.14.1", "3.13.2"], [], "bin/python3.13"),
        (">=3.12", ["3.14.1"], ["3.12.1", "3.12.4"], "versions/3.12.4/bin/python"),
        (">=3.13.14", ["3.13.0", "3.14.1"], ["3.13.2", "3.13.18"], "versions/3.13.18/bin/python"),
        (">=3.13.14", [], ["3.13.14", "3.13.19", "3.13.0"], "versions/3.13.14/bin/python"),
        (">=3.13.14", ["3.13.0", "3.14.1"], [], "bin/python3.14"),
        (">=3.10,<3.13", ["3.13.14"], ["3.12.1"], "versions/3.12.1/bin/python"),
    ],
)
def test_the_lowest_minor_version_that_the_wheel_takes_is_chosen(
    required, on_path, under_pyenv, chosen, machine, tmp_path
):
    """3.13.19 cannot run here."""
    machine(required, on_path, under_pyenv)
    assert find_python("0.7.0", tmp_path) == str(tmp_path / chosen)


def test_uv_fetches_a_python_of_the_minor_version_that_nemo_gym_is_developed_on(machine, tmp_path):
    calls = machine(">=3.13.14", ["3.13.0"], fetched="/uv/cpython-3.13.18/bin/python3.13")
    assert find_python("0.7.0", tmp_path) == "/uv/cpython-3.13.18/bin/python3.13"
    assert calls.read_text().splitlines()[1:] == [
        "python find --no-project >=3.13.14",
        "python install >=3.13.14,==3.13.*",
        "python find --no-project --managed-python >=3.13.14,==3.13.*",
    ]


def test_without_a_fitting_python_one_line_names_the_rule_and_the_ways_out(machine, tmp_path):
    machine(">=3.13.14", ["3.12.3"], ["3.13.0"])
    with pytest.raises(ConfigError) as caught:
        find_python("0.7.0", tmp_path)
    assert str(caught.value) == (
        "NeMo Gym 0.7.0 needs Python >=3.13.14: none is on PATH or under pyenv, and uv could not fetch one "
        "(cause: Name or service not known). Install such a Python, or set gym.python to an interpreter that "
        "has nemo-gym==0.7.0 installed"
    )


def test_the_wheel_is_fetched_once_for_each_version(machine, tmp_path):
    calls = machine(">=3.13.14", ["3.13.14"])
    for _ in range(2):
        assert str(required_python("0.7.0", tmp_path)) == ">=3.13.14"
    assert len(calls.read_text().splitlines()) == 1
    assert not list(tmp_path.glob("wheel-*"))


def test_an_index_that_cannot_be_reached_is_said(machine, tmp_path):
    machine("")
    with pytest.raises(ServiceError, match=r"uv could not fetch nemo-gym==0\.7\.0:\nerror: the index cannot"):
        find_python("0.7.0", tmp_path)
