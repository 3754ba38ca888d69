"""The command `gymexp`, its list of commands, their help, and completion in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gymexp.cli import completion
from gymexp.config.schema import GymConfig
from gymexp.gym.catalogue import load_catalogue
from gymexp.record.places import cache_dir

ROOT = Path(__file__).parent.parent
PROGRAM = Path(sys.executable).with_name("gymexp")


def say(*words: str) -> tuple[int, str]:
    """The installed program, as a user types it."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([PROGRAM, *words], capture_output=True, text=True, cwd="/", env=env, check=False)
    return done.returncode, done.stdout + done.stderr


def test_each_command_is_listed_with_what_it_does_and_is_a_module():
    code, said = say()
    assert code == 0
    for command in completion.COMMANDS:
        module = ROOT / "gymexp" / command
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
        assert any(line.split()[:1] == [command] and len(line.split()) > 3 for line in said.splitlines())


def test_a_command_that_is_none_is_refused_with_the_one_that_was_meant():
    code, said = say("trian")
    assert code == 1 and said.startswith("error: trian is not a command of gymexp; did you mean train?")


def test_the_program_is_the_module():
    code, said = say("train", "trainer.lr=1")
    assert code == 1 and "trainer.lr is not an argument of trl.GRPOConfig" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", completion.COMMANDS)
def test_help_says_what_a_command_does_before_anything_else(command):
    code, said = say(command, "--help")
    assert code == 0
    start = said.partition("Configuration groups")[0]
    about = say()[1].partition(f"  {command} ")[2].splitlines()[0].strip()
    assert " ".join(about.split()) in " ".join(start.split()), start


CHOICES = """
{script}
COMP_LINE="$1" COMP_POINT=${{#COMP_LINE}} COMP_WORDBREAKS=" "
_gymexp_complete
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def complete(line: str, bin_: Path = Path(sys.executable).parent) -> list[str]:
    """What bash offers for a line, at its end."""
    env = os.environ | {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    shell = CHOICES.format(script=completion.script())
    done = subprocess.run(
        ["bash", "-c", shell, "bash", line], capture_output=True, text=True, env=env, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("gymexp ", set(completion.COMMANDS)),
        ("gymexp co", {"coldstart"}),
        ("gymexp train model=qwen3_4", {"model=qwen3_4b"}),
        ("python -m gymexp.train model=qwen3_4", {"model=qwen3_4b"}),
        ("gymexp doctor engine=v", {"engine=vllm"}),
        ("gymexp doctor --i", {"--init"}),
        ("gymexp sweep re", {"resubmit"}),
        ("gymexp envs --s", {"--search"}),
        ("gymexp status --f", {"--follow"}),
        ("gymexp prepare trainer=dr", {"trainer=dr_grpo"}),
        ("python script.py mod", set()),
    ],
)
def test_bash_completes(line, offered):
    assert set(complete(line)) == offered


@pytest.mark.gym
@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_the_names_of_nemo_gyms_environments(gym_python):
    load_catalogue(GymConfig(), cache_dir(), print)
    assert set(complete("gymexp train env=xlam")) == {"env=xlam_fc"}
    assert set(complete("gymexp envs show xlam")) == {"xlam_fc"}


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_where_the_path_has_a_space_and_pip_starts_python_through_sh(tmp_path):
    bin_ = tmp_path / "a b"
    bin_.mkdir()
    for name, line in (("gymexp", "exit 1"), ("python", f'exec "{sys.executable}" "$@"')):
        (bin_ / name).write_text(f"#!/bin/sh\n{line}\n")
        (bin_ / name).chmod(0o755)
    assert complete("gymexp doctor engine=v", bin_) == ["engine=vllm"]
