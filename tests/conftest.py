"""What tests share: NeMo Gym's interpreter, and a cache that outlives a test session."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from newer_gym import newer_cache
from slurm_sweeps import Submitted
from vllm_cpu import vllm_here
from whole_run import Run

from gymexp.config.schema import EnvConfig, GymConfig
from gymexp.gym.definitions import ensure_environments
from gymexp.record.places import cache_dir

SERVERS = {
    name: EnvConfig(config_path=f"resources_servers/{name}/configs/{name}.yaml", agent=f"{name}_simple_agent")
    for name in ("reasoning_gym", "workplace_assistant")
}

os.environ.setdefault("WANDB_MODE", "disabled")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup, which the runs would inherit
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gym-version", help="the NeMo Gym of the tests that take one, instead of the default")
    help_ = "1/2: of the files with whole runs, the grids and the faults, every second from the second on"
    parser.addoption("--part", type=_part, default=(0, 1), help=help_)


def _part(text: str) -> tuple[int, int]:
    first, _, every = text.partition("/")
    if not 0 <= int(first) < int(every):
        raise ValueError(text)
    return int(first), int(every)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long ones first, so that of two workers none waits for them in the end."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
    first, every = config.getoption("--part")
    runs = [item for item in items if item.get_closest_marker("e2e") and not is_apart(item)]
    today = set(sorted({item.path for item in runs})[first::every])
    left_out = {id(item) for item in runs if item.path not in today}
    grids = [item for item in items if item.get_closest_marker("grid")]
    left_out |= {id(item) for item in grids} - {id(item) for item in grids[first::every]}
    items[:] = [item for item in items if id(item) not in left_out]


def is_apart(item: pytest.Item) -> bool:
    """Returns whether a test is one of `make test-more` or `make test-faults`."""
    needs = any(item.get_closest_marker(name) for name in ("gpu", "ranks", "vllm", "ray", "slurm"))
    return needs or "fault" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def gym_python(request: pytest.FixtureRequest) -> Path:
    """NeMo Gym's interpreter with what both environments need; made on first use, as a run makes it."""
    version = request.config.getoption("--gym-version")
    cache = newer_cache(version, cache_dir()) if version else cache_dir()
    gym = GymConfig(version=version) if version else GymConfig()
    return ensure_environments(gym, SERVERS, cache, print)


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    return vllm_here()


@pytest.fixture
def vllm(vllm_python, monkeypatch) -> list[str]:
    """Overrides of a run that samples with the real vLLM, on a CPU."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return ["engine=vllm", f"engine.python='{vllm_python}'", "engine.args.enforce_eager=true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A path that has to be quoted wherever it is passed on; runs of other files have others."""
    return tmp_path_factory.mktemp("runs") / "with a space"


@pytest.fixture
def started(folder: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run; what a failed test leaves of it is ended."""
    runs: list[Run] = []

    def start(name: str, *overrides: str, resume: bool = False, own: Path | None = None) -> Run:
        runs.append(Run(folder / name, *overrides, resume=resume, own=own))
        return runs[-1]

    yield start  # pytest comes back here after a failure too
    for run in runs:
        run.kill()


@pytest.fixture
def commands(tmp_path, monkeypatch) -> Callable[..., None]:
    """Puts shell scripts of these names on the PATH, before all that is there: squeue="echo …"."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def put(**scripts: str) -> None:
        for name, body in scripts.items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)

    return put


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """A Slurm cluster that answers; one of virtual nodes on loopback is started where there is none."""
    if shutil.which("sinfo") and subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0:
        yield
        return
    if os.getuid() or not shutil.which("apt-get"):
        pytest.skip("no Slurm cluster answers, and starting one takes root on Debian")
    scripts = Path(__file__).parent / "slurm"
    started = subprocess.run(
        [scripts / "cluster_up.sh"], capture_output=True, text=True, check=False, timeout=300
    )
    assert started.returncode == 0, started.stdout + started.stderr
    yield
    subprocess.run([scripts / "cluster_down.sh"], check=False, timeout=60)


@pytest.fixture
def two_ranks(vllm, monkeypatch) -> list[str]:
    """The placement takes these names for GPUs; torch and vLLM, which are for CPUs here, know of none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    changes = ["placement.rollout_gpus=1", "placement.train_gpus=2", "engine.weights=disk"]
    changes += ["rollout.drift_every=1", "rollout.max_drift=3e-4", "trainer.warmup_steps=0"]
    return [*vllm, *changes, "evaluation.before=false", "evaluation.after=false"]


@pytest.fixture
def submitted(slurm, gym_python, tmp_path) -> Iterator[Callable[..., Submitted]]:
    """Submits to a directory that has to be quoted; what a failed test leaves of it is cancelled."""
    made: list[Submitted] = []

    def submit(*overrides: str, **more: Any) -> Submitted:
        made.append(Submitted(tmp_path / "with a space" / f"sweep{len(made)}", *overrides, **more))
        return made[-1]

    yield submit
    for one in made:
        one.end()
