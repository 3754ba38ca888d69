"""What documents and comments recommend is accepted: each command composes and loads, each key can be set."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException

from gymexp.cli import hydra_keys, variants
from gymexp.config import evaluate_load
from gymexp.config.group_options import CONF_DIR
from gymexp.config.hydra_schema import register
from gymexp.config.load import load
from gymexp.config.schema import RunConfig

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guides").glob("*.md")]
TEXTS += [*CONF_DIR.rglob("*.yaml"), *(ROOT / "sweeps").glob("*.yaml")]


def commands() -> list[str]:
    """What follows `python -m gymexp.train`, up to a comment or what a shell would do with it."""
    found = set()
    for path in TEXTS:
        text = re.sub(r"\\\n\s*", "", path.read_text())
        for said in re.findall(r"python -m gymexp\.train((?: [^\n#`|>&]+)?)", text):
            words = re.split(r" {2,}", said)[0]
            words = " ".join(word for word in words.split() if word != "…")
            words = re.sub(r"=…(?= |$)", "=0", words)
            if "<" not in words and "-sc" not in words and not re.search(r"(^| )(\(|resume)", words):
                found.add(words)
    return sorted(found)


def keys() -> list[str]:
    """`key=…` in prose, with an environment's name where any stands."""
    text = "\n".join(path.read_text() for path in TEXTS)
    said = re.findall(r"(?<![\w./+-])((?:[a-z_]+)(?:\.(?:<name>|[a-z_0-9]+))+)=", text)
    said = [re.sub(r"^env\.(?!workplace\.)[^.]+", "env.sudoku", key) for key in said]
    return sorted({key.replace("<name>", "sudoku") for key in said} - {"hydra.run.dir", "hydra.sweep.dir"})


def read(command: str) -> tuple[argparse.Namespace, str, list[str]]:
    said = get_args_parser().parse_args(shlex.split(command))
    folder = str(ROOT / said.config_dir) if said.config_dir else str(CONF_DIR)
    search = [f"hydra.searchpath=[file://{CONF_DIR}]"] if said.config_dir else []
    return said, folder, [*search, *said.overrides]


def test_there_is_something_to_look_at():
    assert len(commands()) > 25 and len(keys()) > 25
    assert "env.sudoku.data.options.config.min_empty" in keys()


@pytest.mark.grid
@pytest.mark.parametrize("command", commands())
def test_each_command_composes_and_its_first_job_loads(command):
    register()
    variants.register()
    hydra_keys.check_flags(shlex.split(command))
    said, folder, overrides = read(command)
    if re.search("blackjack|mcqa|simpleqa", command):
        pytest.skip("an environment of NeMo Gym's catalogue: tests/test_guides.py runs such commands")
    if "between" in command:
        pytest.skip("an environment of the guide's own: tests/test_own_environment.py runs it")
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [one.input_line]
        for one in parsed
    ]
    with initialize_config_dir(folder, version_base="1.3"):
        for point in product(*values):
            cfg = compose(said.config_name or "train", list(point), return_hydra_config=True)
            sweep = said.multirun or str(cfg.hydra.mode).endswith("MULTIRUN")
            assert list(hydra_keys.problems(cfg, sweep)) == []
            params = cfg.hydra.sweeper.params or {}
            first = [f"{key}={str(value).split(',')[0]}" for key, value in params.items()]
            first = [one.replace("range", "0 #").partition(" #")[0] for one in first]
            assert load(compose(said.config_name or "train", [*first, *point])).env


@pytest.mark.grid
@pytest.mark.parametrize("key", keys())
def test_each_key_that_is_recommended_can_be_set_without_a_plus(key):
    register()
    evaluate_load.register()
    top = key.partition(".")[0]
    launcher = ["launcher=slurm"] if key.startswith("hydra.launcher") else []
    tops = {field.name for field in dataclasses.fields(RunConfig)} | {"hydra"}
    if top not in tops:
        pytest.skip(f"{key}: of another command, or another program's")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        setting = [*launcher, "env=[sudoku,workplace]", f"{key}=null"]
        refused = [command for command in ("train", "evaluate") if not can_set(command, setting)]
        assert refused != ["train", "evaluate"]


def can_set(command: str, setting: list[str]) -> bool:
    """Whether the command's configuration has the key, whatever value it wants."""
    try:
        compose(command, setting, return_hydra_config=True)
    except ConfigCompositionException as error:
        return "Could not override" not in str(error)
    return True


def without_slurm(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gymexp.train", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PATH": "/nowhere", "PYTHONPATH": str(ROOT)},
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_brackets_of_a_command_stand_in_quotes(path):
    """zsh takes `env=[sudoku]` for a pattern of files, and ends where none has that name."""
    for line in path.read_text().splitlines():
        command = line[line.find("python -m gymexp") :] if "python -m gymexp" in line else ""
        assert not re.search(r"(?<=\s)[\w.]+=\[", re.sub(r"\s#.*", "", command)), line


def test_a_dry_run_needs_no_slurm_and_leaves_nothing(tmp_path):
    said = ["launcher=slurm", "launcher.dry_run=true", "launcher.gpus=2", "launcher.time='1-12'"]
    shown = without_slurm(tmp_path, "-m", *said, "seed=0,1")
    assert shown.returncode == 0, shown.stderr
    for line in ("--array=0-1%2", "--gpus-per-node=2", "--time=1-12", "--signal=USR2@120", "--requeue"):
        assert f"#SBATCH {line}\n" in shown.stdout
    assert re.search(r"^srun .*submitit\.core\._submit .*/slurm$", shown.stdout, re.MULTILINE)
    assert shown.stdout.count("# job 1: ") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    real = without_slurm(tmp_path, "launcher=slurm")
    assert real.returncode == 1 and "launcher=slurm needs Slurm's commands" in real.stderr
    assert "Traceback" not in real.stderr


def test_vllm_on_slurm_without_a_word_on_gpus_is_refused(tmp_path):
    shown = without_slurm(tmp_path, "launcher=slurm", "launcher.dry_run=true", "engine=vllm")
    assert shown.returncode == 1
    assert "launcher.gpus must say how many GPUs of each node a job gets with engine=vllm" in shown.stderr
    gres = "hydra.launcher.gres=gpu:2"
    shown = without_slurm(tmp_path, "launcher=slurm", "launcher.dry_run=true", "engine=vllm", gres)
    assert shown.returncode == 0 and "#SBATCH --gres=gpu:2" in shown.stdout
