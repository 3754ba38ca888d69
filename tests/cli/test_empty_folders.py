"""The folders that Hydra makes for a command: those that stay empty go, and all others stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gymexp.config.group_options import CONF_DIR

FOLDERS = """
import os
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from gymexp.cli.entry import hydra_main
from gymexp.errors import GymexpError
from gymexp.sweep.launchers import LAUNCHERS

@hydra_main(config_name="train", launchers=LAUNCHERS)
def main(cfg):
    print(*sorted(str(path) for path in Path().rglob("*") if path.is_dir()))
    if cfg.seed == 1:
        (Path(HydraConfig.get().runtime.output_dir) / "file").touch()
    if cfg.seed == 2:
        raise GymexpError("a mistake")
    if cfg.seed == 3:
        os.kill(os.getpid(), 9)

main()
"""


def command(cwd: Path, *words: str, module: str = "gymexp.train") -> subprocess.CompletedProcess[str]:
    (cwd / "folders.py").write_text(FOLDERS)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(CONF_DIR.parent), str(cwd)])}
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env | {"PYTHONDONTWRITEBYTECODE": "1"},
        timeout=120,
        check=False,
    )


def left(cwd: Path) -> set[str]:
    return {str(path.relative_to(cwd)) for path in cwd.rglob("*")} - {"folders.py"}


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.lr=1"],
        ["resume=nowhere"],
        ["trainer.lr=1", "hydra.run.dir=a/b/${hydra:job.name}"],
        ["-m", "trainer.lr=1,2"],
        ["-m", "trainer.lr=1,2", "hydra.sweep.dir=a/b"],
    ],
)
def test_after_a_mistake_neither_the_folder_nor_its_parents_stay(words, tmp_path):
    shown = command(tmp_path, *words)
    assert shown.returncode == 1 and "Traceback" not in shown.stderr, shown.stderr
    assert left(tmp_path) == set()


@pytest.mark.parametrize("seed", [0, 2, 3])
@pytest.mark.parametrize("elsewhere", ["resume=run", "output_dir=run"])
def test_a_run_with_a_directory_elsewhere_has_none_of_hydras_even_if_it_is_killed(seed, elsewhere, tmp_path):
    shown = command(tmp_path, elsewhere, f"seed={seed}", module="folders")
    assert shown.returncode == {0: 0, 2: 1, 3: -9}[seed], shown.stderr
    assert shown.stdout.split() == [] and left(tmp_path) == set()


def test_a_run_in_hydras_directory_finds_and_keeps_it(tmp_path):
    shown = command(tmp_path, "hydra.run.dir=a/b", "seed=1", module="folders")
    assert shown.stdout.split() == ["a", "a/b"]
    assert left(tmp_path) == {"a", "a/b", "a/b/file"}


def test_folders_that_were_there_before_stay(tmp_path):
    (tmp_path / "outputs").mkdir()
    assert command(tmp_path, "trainer.lr=1").returncode == 1
    assert left(tmp_path) == {"outputs"}
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert command(tmp_path, "trainer.lr=1", "hydra.run.dir=a/b").returncode == 1
    assert left(tmp_path) == {"outputs", "a", "a/b"}
