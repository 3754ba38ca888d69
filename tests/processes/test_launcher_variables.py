"""What other launchers leave in the environment reaches no process of a run."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

from gymexp.processes import launcher_variables
from gymexp.processes.process import spawn

LAUNCHED = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29519",
    "PMI_SIZE": "2",
    "PMI_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "2",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_DOWNCAST_BF16": "true",
    "MEGATRON_LM_TP_DEGREE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}
KEPT = dict.fromkeys(
    ("CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "HF_HOME", "OMP_NUM_THREADS", "SLURM_PROCID"), "1"
)
ABOUT_RANKS = re.compile(
    r"[A-Z_]*(RANK|WORLD_SIZE)|MASTER_[A-Z]+|(ACCELERATE|FSDP|TORCHELASTIC|MEGATRON_LM)_[A-Z0-9_]+"
)


def test_what_accelerate_and_torch_read_of_a_launcher_is_dropped_and_the_rest_stays():
    assert launcher_variables.without_launchers(LAUNCHED | KEPT) == KEPT
    assert launcher_variables.of_other_launchers(LAUNCHED | KEPT) == sorted(LAUNCHED)


@pytest.mark.parametrize(
    ("package", "files"),
    [
        ("accelerate", ("state.py", "utils/dataclasses.py", "utils/other.py")),
        ("torch", ("distributed/rendezvous.py",)),
    ],
)
def test_every_variable_by_which_an_installed_library_learns_of_ranks_is_dropped(package, files):
    """Read from the libraries' own source: a new version that reads another one shows here."""
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin
    source = "".join((Path(spec.origin).parent / file).read_text() for file in files)
    read = [
        name
        for name in re.findall(r"""["']([A-Z][A-Z0-9_]*[A-Z0-9])["']""", source)
        if ABOUT_RANKS.fullmatch(name)
    ]
    assert len(set(read)) >= 3
    assert launcher_variables.without_launchers(dict.fromkeys(read, "1")) == {}


def test_a_process_of_a_run_sees_what_gymexp_sets_and_nothing_of_another_launcher(tmp_path, monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    code = "import json, os; print(json.dumps(dict(os.environ)))"

    async def run() -> None:
        child = await spawn([sys.executable, "-c", code], tmp_path / "log", {"RANK": "3"})
        assert await child.wait() == 0

    asyncio.run(run())
    seen = json.loads((tmp_path / "log").read_text())
    assert {name: seen[name] for name in LAUNCHED if name in seen} == {"RANK": "3"}


def test_a_process_that_trains_itself_forgets_them(monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    launcher_variables.forget_launchers()
    assert not LAUNCHED.keys() & os.environ.keys()
