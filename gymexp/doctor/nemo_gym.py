"""NeMo Gym: its venv, or the servers that already run."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterable
from pathlib import Path

from gymexp.doctor.finding import Finding, Subject, ask
from gymexp.record.places import cache_dir

_VERSION = "import importlib.metadata as m, sys; print(m.version('nemo-gym'), *sys.version_info[:2])"


def look(subject: Subject) -> Iterable[Finding]:
    """Whether NeMo Gym is there for `gym.runtime`, or can be made."""
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
    own = Path(gym.checkout or "") / ".venv/bin/python"
    venv = cache_dir() / f"nemo-gym-{gym.version}"
    if gym.python:
        yield _look_at(Path(gym.python), "gym.python must name an interpreter that has nemo-gym")
    elif gym.runtime == "cli" and gym.checkout and own.exists():
        yield _look_at(own, f"make {own.parent.parent} anew, as NeMo Gym's README says")
    elif (venv / "complete").exists():
        yield _look_at(venv / "bin" / "python", f"delete {venv}: the next run makes it anew")
    else:
        python = next((p for v in ("3.12", "3.13", "3.14") if (p := shutil.which(f"python{v}"))), None)
        base = python or "a Python >= 3.12, fetched by uv where there is none"
        fix = "make it while there is a network: python -m gymexp.prepare"
        yield Finding("warn", "nemo gym", f"{venv} is not made yet: the first run makes it, with {base}", fix)


def _look_at(python: Path, fix: str) -> Finding:
    shown = ask(str(python), "-c", _VERSION)
    if shown.code != 0:
        said = (shown.error.splitlines() or ["no output"])[-1]
        return Finding("fail", "nemo gym", f"{python}: {said}", fix)
    version, major, minor = shown.out.split()
    if (int(major), int(minor)) < (3, 12):
        fix = "NeMo Gym needs Python >= 3.12"
        return Finding("fail", "nemo gym", f"{python} is Python {major}.{minor}", fix)
    return Finding("ok", "nemo gym", f"{version} on Python {major}.{minor} ({python})")
