"""NeMo Gym's own Python: a venv of its own, because NeMo Gym and vLLM need different versions of openai.

The cache has a venv for each NeMo Gym version. uv makes it under a lock, so that two runs at once make it
once. The requirements of an environment's servers are installed when the environment is selected for the
first time (`gym.definitions.ensure_environments`), in this venv or in one beside it (`server_venvs.py`).
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from gymexp.config.schema import GymConfig
from gymexp.errors import ConfigError, GymexpError, ServiceError
from gymexp.files import at, replace_file
from gymexp.gym.python_choice import find_python
from gymexp.gym.server_venvs import UnmetNeeds, add_needs, check_own_python, missing_needs, venvs_of
from gymexp.gym.uv_calls import check, install, uv
from gymexp.processes.failure_reason import last_exception
from gymexp.processes.launcher_variables import without_launchers
from gymexp.record.places import cache_dir, cache_refused

_LOCK_TIMEOUT_S = 1800
_COMPLETE = "complete"  # a file in a finished venv that lists its packages
Say = Callable[[str], None]
FoldersOf = Callable[[Path], Iterable[str]]


def ensure_python(gym: GymConfig, folders_of: FoldersOf, cache: Path, say: Say) -> Path:
    """Returns an interpreter with NeMo Gym and the requirements of the servers in some of its folders.

    folders_of: returns these folders, e.g. resources_servers/mcqa, for the interpreter. Its venv is made on
    first use, in about 20 s. `gym.python`, and with `runtime=cli` the checkout's own .venv, are used
    unchanged. Raises ConfigError if the interpreter lacks NeMo Gym or what the servers need, or if the cache
    cannot be used, and ServiceError if uv fails.
    """
    if gym.python:
        own = _checked_python(gym.python, "gym.python")
        if gym.runtime == "managed" and (folders := list(folders_of(own))):
            check_own_python(own, site_packages(own), folders, say)
        return own
    if gym.runtime == "cli" and gym.checkout and (own := Path(gym.checkout) / ".venv/bin/python").exists():
        return _checked_python(str(own), "gym.checkout")
    venv = cache / f"nemo-gym-{gym.version}"
    python = venv / "bin" / "python"
    damage = ""
    try:
        with at(cache):
            cache.mkdir(parents=True, exist_ok=True)
        with _locked(venv, say):
            if damage := find_damage(venv):
                _make(venv, gym.version, damage, say)
            _add_needs(venv, python, gym.version, list(folders_of(python)), say)
            _seal(venv)
    except OSError as error:  # a cache that others fill may be read-only
        if find_damage(venv) or missing_needs(venv, site_packages(python), folders_of(python)):
            raise ConfigError(f"NeMo Gym's venv: {cache_refused(error)}") from None
    except UnmetNeeds:
        raise
    except ServiceError as error:
        if damage:
            raise ServiceError(f"NeMo Gym's venv in {venv} is not whole ({damage}), and {error}") from None
        raise
    return python


def _add_needs(venv: Path, python: Path, version: str, folders: list[str], say: Say) -> None:
    """Adds what the folders of servers need, in this venv or in those beside it."""

    def make(other: Path) -> None:
        _make(other, version, "", say)

    if not folders:
        return
    site = site_packages(python)
    for other in venvs_of(venv, site, folders):
        if damage := find_damage(other):
            _make(other, version, damage, say)
    add_needs(venv, f"nemo-gym=={version}", site, folders, say, make, _seal)


def find_made_venv(gym: GymConfig, cache: Path) -> Path | None:
    """Returns the interpreter that `ensure_python` returned before; None if it has yet to make the venv. Does
    not look for damage."""
    if gym.python or gym.runtime == "cli":
        return ensure_python(gym, lambda python: (), cache, lambda text: None)
    venv = cache / f"nemo-gym-{gym.version}"
    python = venv / "bin" / "python"
    return python if python.exists() and (venv / _COMPLETE).exists() else None


def find_damage(venv: Path) -> str:
    """Returns what is wrong with a venv that gymexp made, e.g. a file of a package that is missing or cut
    short; "" if the venv is whole. Takes about a second."""
    if not (venv / _COMPLETE).exists():
        return "it was not finished"
    if not (venv / "bin" / "python").exists():
        return "its python is gone"  # also if only the target of the link is gone
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
    """Returns an error message if the venv of `python` lost files since the run began; "" if it is whole, or
    if it is not in `cache`: then it is the user's own."""
    venv = python.parent.parent
    if venv.parent != cache or not (damage := find_damage(venv)):
        return ""
    return f"NeMo Gym's venv in {venv} lost files while the run went on ({damage})"


def missing_package(exception: str, python: Path) -> str:
    """Returns advice if an exception of `python` says that a module cannot be imported, else "".

    exception: its text as Python prints it, e.g. "ModuleNotFoundError: No module named 'numpy'".
    """
    if not re.match(r"(ModuleNotFoundError|ImportError)\b", exception):
        return ""
    return (
        "the requirements.txt in a server's folder must list the packages that the server needs; if a part "
        f"of NeMo Gym itself is missing, reinstall it in {python.parent.parent}, or leave gym.python out"
    )


def environ_for(python: Path) -> dict[str, str]:
    """Returns the environment variables for a process of `python`. gymexp's own venv stores compiled code
    even if PYTHONDONTWRITEBYTECODE is set, as in many containers; otherwise each start of the host takes 10 s
    more."""
    ours = python.is_relative_to(cache_dir())
    return {k: v for k, v in without_launchers().items() if not (ours and k == "PYTHONDONTWRITEBYTECODE")}


def run_script(
    python: Path,
    arguments: Sequence[str | Path],
    what: str,
    raises: type[GymexpError],
    deadline_s: float,
    given: bytes = b"",
    cwd: Path | None = None,
) -> bytes:
    """Runs a script in NeMo Gym's Python with `given` as its stdin, and returns its stdout.

    what: the script, as an error names it. Raises `raises` if the script fails or takes longer.
    """
    try:
        done = subprocess.run(
            [python, "-P", "-W", "ignore", *arguments],
            input=given,
            capture_output=True,
            timeout=deadline_s,
            env=environ_for(python),
            cwd=cwd,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise raises(f"{what} took longer than {deadline_s:.0f} s") from None
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip()
        reason = last_exception(text) or text[-2000:]
        advice = missing_package(reason, python)
        raise raises(
            f"{what}, in {python}, ended with {done.returncode}: {reason}" + (f"\n{advice}" if advice else "")
        )
    return done.stdout


def site_packages(python: Path) -> Path:
    """Returns the directory that contains the interpreter's nemo_gym and the folders of NeMo Gym's servers.
    Raises ConfigError if `python` cannot run or has no nemo_gym."""
    code = "import importlib.util as u; print(u.find_spec('nemo_gym').submodule_search_locations[0])"
    try:
        process = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"{python} cannot be run: {error.strerror}") from None
    if process.returncode:
        raise ConfigError(f"{python} has no nemo_gym: {process.stderr.strip().splitlines()[-1]}")
    return Path(process.stdout.strip()).parent


def nemo_gym_version(site: Path) -> str:
    """Returns the version of the NeMo Gym in a directory of packages; "" if it does not say."""
    names = sorted(path.name for path in site.glob("nemo_gym-*.dist-info"))
    return names[0].removesuffix(".dist-info").split("-")[1] if names else ""


def _checked_python(python: str, key: str) -> Path:
    path = Path(python)
    if not path.exists():
        raise ConfigError(f"{key} must be an interpreter with nemo_gym, but {python} does not exist")
    site_packages(path)
    return path


@contextlib.contextmanager
def _locked(venv: Path, say: Say) -> Iterator[None]:
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
    """Returns the RECORD files, which list a package's files, of all installed packages and of the `known`
    ones.

    known: names of .dist-info folders that the venv had; a package that is gone is found that way.
    """
    site = next(venv.glob("lib/python*/site-packages"), venv)
    return [site / name / "RECORD" for name in sorted({*known, *(p.name for p in site.glob("*.dist-info"))})]


def _seal(venv: Path) -> None:
    """Writes the list of a whole venv's packages to its `complete` file, if the list has changed."""
    packages = "".join(f"{record.parent.name}\n" for record in _records(venv))
    if not (venv / _COMPLETE).exists() or (venv / _COMPLETE).read_text(encoding="utf-8") != packages:
        replace_file(venv / _COMPLETE, packages)


def _make(venv: Path, version: str, damage: str, say: Say) -> None:
    """Makes the venv. If that fails, e.g. without a network, a damaged venv is put back: it may still
    work."""
    base = find_python(version, venv.parent)
    why = f": {damage}" if venv.exists() else ""
    say(f"making NeMo Gym {version}'s venv in {venv} (Python: {base}){why}")
    aside = venv.with_name(f"{venv.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    if venv.exists():
        venv.rename(aside)
    try:
        check(uv("venv", "--quiet", "--python", base, venv), "make NeMo Gym's venv")
        # httptools is a parser in C for uvicorn, whose own parser in Python takes a fifth of a server's time.
        install(venv / "bin" / "python", f"nemo-gym=={version}", "httptools")
        _seal(venv)
    except BaseException:
        shutil.rmtree(venv, ignore_errors=True)
        if aside.exists():
            aside.rename(venv)
        raise
    shutil.rmtree(aside, ignore_errors=True)
