"""Servers are imported with their own folder on the path, as NeMo Gym starts them there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gymexp.gym

APP = """
from nemo_gym.server_utils import SimpleServer
from words import WORD

class Mine(SimpleServer):
    def say(self):
        from late import LATE
        return WORD + LATE
"""
# Imports the servers as the host does, and says of each what it says, or its error.
ASK = """
import json, sys
sys.path[:0] = sys.argv[1:3]
from server_code import Code
codes = {name: Code(f"resources_servers.{name}.app") for name in ("one", "broken", "two")}
left = [name for name in ("words", "late") if name in sys.modules]
said = {}
for name, code in codes.items():
    try:
        said[name] = code.enter()().say()
        for module in ("words", "late"):  # each server has a process of its own
            sys.modules.pop(module, None)
        sys.path.remove(code.path[0])
    except Exception as error:
        said[name] = repr(error)
print(json.dumps([said, left]))
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "nemo_gym").mkdir()
    (tmp_path / "nemo_gym" / "__init__.py").touch()
    (tmp_path / "nemo_gym" / "server_utils.py").write_text("class SimpleServer: ...\n")
    for name in ("one", "two", "broken"):
        folder = tmp_path / "resources_servers" / name
        folder.mkdir(parents=True)
        (folder / "app.py").write_text(APP)
        (folder / "late.py").write_text(f"LATE = ' and {name} late'\n")
        if name != "broken":
            (folder / "words.py").write_text(f"WORD = '{name}'\n")
    return tmp_path


def test_each_server_has_the_modules_of_its_own_folder_and_a_broken_one_hurts_no_other(site):
    scripts = str(Path(gymexp.gym.__file__).parent)
    command = [sys.executable, "-c", ASK, scripts, str(site)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said, left = json.loads(done.stdout)
    assert said == {
        "one": "one and one late",
        "two": "two and two late",
        "broken": "ModuleNotFoundError(\"No module named 'words'\")",
    }
    assert left == [], "they are importable in the server's own process alone"


def test_the_host_finds_it_beside_itself_also_in_a_job_which_has_a_safe_path():
    host = Path(gymexp.gym.__file__).with_name("host.py")
    script = f"import runpy; assert runpy.run_path({str(host)!r})['Code']"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
