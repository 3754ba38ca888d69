"""NeMo Gym's own Python: a venv apart from gymexp's, because NeMo Gym and vLLM need different versions of
openai.

One cached venv a NeMo Gym version, made by uv under a lock, so that two runs at once make it once. What the
selected environments' servers list in their requirements.txt is added as they are first selected.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from gymexp.config.schema import GymConfig
from gymexp.errors import ConfigError, ServiceError
from gymexp.files import at, replace_file
from gymexp.processes.environment import without_launchers
from gymexp.record.places import cache_dir, cache_refused, own_servers

_MINIMUM = (3, 12)
_PREFERRED = ("3.12", "3.13", "3.14")  # 3.12 is what NeMo Gym 0.4 is developed on
_LOCK_TIMEOUT_S = 1800
_COMPLETE = "complete"  # a file of a venv that was finished, with the packages that it had then
Say = Callable[[str], None]


def ensure_python(gym: GymConfig, config_paths: Iterable[str], cache: Path, say: Say) -> Path:
    """An interpreter with NeMo Gym and what the servers of `config_paths` need. Made on first use, in about
    20 s.

    `gym.python`, and a checkout's own .venv with `runtime=cli`, are taken as they are.
    """
    if gym.python:
        return _given(gym.python, "gym.python")
    if gym.runtime == "cli" and gym.checkout and (own := Path(gym.checkout) / ".venv/bin/python").exists():
        return _given(str(own), "gym.checkout")
    venv = cache / f"nemo-gym-{gym.version}"
    python = venv / "bin" / "python"
    lacking = ""
    try:
        with at(cache):
            cache.mkdir(parents=True, exist_ok=True)
        with _held(venv, say):
            if lacking := lacks(venv):
                _make(venv, gym.version, lacking, say)
            _add_requirements(venv, python, config_paths, say)
            _seal(venv)
    except OSError as error:  # a cache that others fill may be read-only here
        if lacks(venv) or list(_to_add(venv, python, config_paths)):
            raise ConfigError(f"NeMo Gym's venv: {cache_refused(error)}") from None
    except ServiceError as error:
        if lacking:
            raise ServiceError(f"NeMo Gym's venv in {venv} is not whole ({lacking}), and {error}") from None
        raise
    return python


def lacks(venv: Path) -> str:
    """What is wrong with a venv that was made here: a file of its packages that is missing or cut short;
    empty of a whole one. In about a second."""
    if not (venv / _COMPLETE).exists():
        return "it was not finished"
    if not (venv / "bin" / "python").exists():
        return "its python is gone"  # or the one that it was made from
    for record in _records(venv, (venv / _COMPLETE).read_text(encoding="utf-8").split()):
        try:
            for name, _, size in csv.reader(record.read_text(encoding="utf-8").splitlines()):
                path = os.path.join(record.parent.parent, name)
                if not os.path.exists(path) or os.path.getsize(path) < int(size or 0):
                    return f"{name} is missing or cut short"
        except (OSError, ValueError):
            return f"{record} is missing or damaged"
    return ""


def lost(python: Path, cache: Path) -> str:
    """What became of the venv that was whole when a run began; empty of one that still is, or is a user's."""
    venv = python.parent.parent
    if venv.parent != cache or not (lacking := lacks(venv)):
        return ""
    return f"NeMo Gym's venv in {venv} lost files while the run went on ({lacking})"


def missing_package(said: str, python: Path) -> str:
    """What to do about an exception of `python`'s, if it is that a module cannot be imported."""
    if not re.match(r"(ModuleNotFoundError|ImportError)\b", said):
        return ""
    return (
        "what an environment's server needs is listed in the requirements.txt in its folder; where a part "
        f"of NeMo Gym itself is missing, install it anew in {python.parent.parent}, or leave gym.python out"
    )


def environ_for(python: Path) -> dict[str, str]:
    """The environment for what `python` runs. Our own venv keeps what is compiled also where
    PYTHONDONTWRITEBYTECODE is set, as in many containers: each start of the host would take 10 s more."""
    ours = python.is_relative_to(cache_dir())
    return {k: v for k, v in without_launchers().items() if not (ours and k == "PYTHONDONTWRITEBYTECODE")}


def site_packages(python: Path) -> Path:
    """Where the interpreter's nemo_gym lies; its servers' folders are beside it."""
    code = "import importlib.util as u; print(u.find_spec('nemo_gym').submodule_search_locations[0])"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"{python} cannot be run: {error.strerror}") from None
    if found.returncode:
        raise ConfigError(f"{python} has no nemo_gym: {found.stderr.strip().splitlines()[-1]}")
    return Path(found.stdout.strip()).parent


def find_python() -> str:
    """A Python >= 3.12: on PATH, under pyenv, or fetched by uv. Raises ConfigError if there is none."""
    for name in (f"python{v}" for v in _PREFERRED):
        if (path := shutil.which(name)) and _version_of(path) >= _MINIMUM:
            return path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for version in _PREFERRED:
        for path in sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True):
            if _version_of(str(path)) >= _MINIMUM:
                return str(path)
    found = _uv("python", "find", "--no-project", ">=3.12")
    if found.returncode and not (found := _uv("python", "install", "3.12")).returncode:
        found = _uv("python", "find", "--no-project", "--managed-python", "3.12")
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(
            "NeMo Gym needs Python >= 3.12: none is on PATH or under pyenv, and uv could not fetch one "
            f"({last}). Install Python 3.12, or set gym.python to an interpreter that has nemo-gym installed"
        )
    return found.stdout.strip()


def _given(python: str, key: str) -> Path:
    path = Path(python)
    if not path.exists():
        raise ConfigError(f"{key} must be an interpreter with nemo_gym, but {python} does not exist")
    site_packages(path)
    return path


def _version_of(python: str) -> tuple[int, ...]:
    code = "import sys; print(*sys.version_info[:2])"
    shown = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return tuple(int(part) for part in shown.stdout.split()) if shown.returncode == 0 else ()


def _uv(*arguments: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    from uv import find_uv_bin

    return subprocess.run([find_uv_bin(), *arguments], capture_output=True, text=True, check=False)


@contextlib.contextmanager
def _held(venv: Path, say: Say) -> Iterator[None]:
    lock = FileLock(f"{venv}.lock", timeout=_LOCK_TIMEOUT_S)
    try:
        lock.acquire(timeout=0.05)
    except Timeout:
        say("waiting for another run that is making NeMo Gym's venv")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _records(venv: Path, known: Iterable[str] = ()) -> list[Path]:
    """The packages' lists of files: of those that are there, and of those that are known to have been."""
    site = next(venv.glob("lib/python*/site-packages"), venv)
    return [site / name / "RECORD" for name in sorted({*known, *(p.name for p in site.glob("*.dist-info"))})]


def _seal(venv: Path) -> None:
    """Write down which packages a whole venv has."""
    packages = "".join(f"{record.parent.name}\n" for record in _records(venv))
    if not (venv / _COMPLETE).exists() or (venv / _COMPLETE).read_text(encoding="utf-8") != packages:
        replace_file(venv / _COMPLETE, packages)


def _make(venv: Path, version: str, lacking: str, say: Say) -> None:
    """What was there is put back where no whole one can be made, without a network say: it may still
    serve."""
    base = find_python()
    why = f": {lacking}" if venv.exists() else ""
    say(f"making NeMo Gym {version}'s venv in {venv} (Python: {base}){why}")
    aside = venv.with_name(f"{venv.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    if venv.exists():
        venv.rename(aside)
    try:
        _checked(_uv("venv", "--quiet", "--python", base, venv), "make NeMo Gym's venv")
        # httptools: uvicorn's parser in C, where its own in Python takes a fifth of a server's time.
        _install(venv / "bin" / "python", [f"nemo-gym=={version}", "httptools"])
        _seal(venv)
    except BaseException:
        shutil.rmtree(venv, ignore_errors=True)
        if aside.exists():
            aside.rename(venv)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _add_requirements(venv: Path, python: Path, config_paths: Iterable[str], say: Say) -> None:
    for name, wanted, added in _to_add(venv, python, config_paths):
        if wanted:
            say(f"adding what {name} needs: {' '.join(wanted)}")
            _install(python, wanted)
        added.touch()


def _to_add(venv: Path, python: Path, config_paths: Iterable[str]) -> Iterator[tuple[str, list[str], Path]]:
    """Of each folder of servers whose requirements are not in the venv yet: its name, these, and the file
    that is to say that they are."""
    site = site_packages(python)
    for folder in sorted({Path(p).parent.parent for p in config_paths}):
        own = own_servers() / folder / "requirements.txt"
        listed = own if own.exists() else site / folder / "requirements.txt"
        if not listed.exists():
            continue
        sha256 = hashlib.sha256(listed.read_bytes()).hexdigest()[:12]
        added = venv / f"added-{'-'.join(folder.parts)}-{sha256}"
        if not added.exists():
            lines = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines()]
            yield folder.name, [line for line in lines if line and not line.startswith(("-e", "#"))], added


def _install(python: Path, requirements: list[str]) -> None:
    _checked(
        _uv("pip", "install", "--quiet", "--python", python, *requirements), f"install {requirements[0]}"
    )


def _checked(result: subprocess.CompletedProcess[str], what: str) -> None:
    if result.returncode:
        raise ServiceError(f"uv could not {what}:\n{result.stderr.strip()}")
