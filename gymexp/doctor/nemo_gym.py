"""The check of NeMo Gym: of its venv, or of its servers if they already run."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path

from gymexp.doctor.finding import Finding, Subject, run_command
from gymexp.gym.python_choice import kept_required_python
from gymexp.record.places import cache_dir

_VERSION = "import importlib.metadata as m, sys; print(m.version('nemo-gym'), *sys.version_info[:2])"


def look(subject: Subject) -> Iterable[Finding]:
    """Yields a finding about whether NeMo Gym is ready for `gym.runtime`, or will be installed by the first
    run."""
    gym = subject.config.gym
    if gym.runtime == "attach":
        try:
            socket.create_connection((gym.head_host, gym.head_port), timeout=5).close()
        except OSError as error:
            fix = "start NeMo Gym's servers, or say gym.head_host=… gym.head_port=…"
            yield Finding("fail", "nemo gym", f"{gym.head_host}:{gym.head_port}: {error}", fix)
            return
        yield Finding("ok", "nemo gym", f"a server listens on {gym.head_host}:{gym.head_port}")
        return
    if gym.runtime == "cli" and gym.checkout and not Path(gym.checkout).is_dir():
        fix = "name the directory of your NeMo Gym checkout"
        yield Finding("fail", "nemo gym", f"gym.checkout={gym.checkout} is no directory", fix)
        return
    own_python = Path(gym.checkout or "") / ".venv/bin/python"
    venv = cache_dir() / f"nemo-gym-{gym.version}"
    if gym.python:
        yield _look_at(Path(gym.python), "gym.python must name an interpreter that has nemo-gym")
    elif gym.runtime == "cli" and gym.checkout and own_python.exists():
        yield _look_at(own_python, f"make {own_python.parent.parent} anew, as NeMo Gym's README says")
    elif (venv / "complete").exists():
        yield _look_at(venv / "bin" / "python", f"delete {venv}: the next run makes it anew")
    else:
        required = kept_required_python(gym.version, cache_dir())
        base = f"Python {required}" if required else "a Python that this version takes"
        base += ", which uv downloads if there is none"
        fix = "make it while the network can be reached: python -m gymexp.prepare"
        yield Finding("warn", "nemo gym", f"{venv} is not made yet: the first run makes it, with {base}", fix)


def _look_at(python: Path, fix: str) -> Finding:
    """Returns a finding about whether an interpreter has nemo-gym and is Python 3.12 or newer."""
    result = run_command(str(python), "-c", _VERSION)
    if result.code != 0:
        reason = (result.error.splitlines() or ["no output"])[-1]
        return Finding("fail", "nemo gym", f"{python}: {reason}", fix)
    version, major, minor = result.out.split()
    if (int(major), int(minor)) < (3, 12):
        fix = "NeMo Gym needs Python >= 3.12"
        return Finding("fail", "nemo gym", f"{python} is Python {major}.{minor}", fix)
    return Finding("ok", "nemo gym", f"{version} on Python {major}.{minor} ({python})")
