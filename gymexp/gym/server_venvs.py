"""The venvs that have the requirements of NeMo Gym's servers.

NeMo Gym gives each server a venv of its own, as their requirements conflict: numpy==2.2.6 of one,
numpy==2.4.4 of another. gymexp puts servers together as long as uv finds versions that satisfy all of them:
first in the venv that has NeMo Gym, `nemo-gym-<version>`, then in `nemo-gym-<version>-2`, `-3`, …. Each venv
has NeMo Gym, and in a run one host process. A file in the venv, the marker, has the requirements of a folder
that were installed there; uv gets all of them whenever it adds some.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from gymexp.errors import ConfigError, ServiceError
from gymexp.gym.requirements import Needs, marker_prefix, needs_of
from gymexp.gym.uv_calls import install, uv

Say = Callable[[str], None]
_CONFLICT = "No solution found"  # so uv begins its explanation


class UnmetNeeds(ServiceError):
    """The requirements of a server's folder could not be installed."""

    def __init__(self, folder: str, why: str) -> None:
        super().__init__(f"{folder} needs what could not be installed: {why}")
        self.folder = folder


def add_needs(
    base: Path,
    nemo_gym: str,
    site: Path,
    folders: Iterable[str],
    say: Say,
    make: Callable[[Path], None],
    seal: Callable[[Path], None],
) -> None:
    """Installs what some of the folders still need, each in the first venv where it fits.

    base: the venv that has NeMo Gym. nemo_gym: its requirement, e.g. nemo-gym==0.4.0. site: the directory of
    NeMo Gym's folders. make: makes a further venv with NeMo Gym, or one anew that lost files. seal: notes
    which packages a venv has. Raises UnmetNeeds if uv cannot install the requirements of a folder; those of
    the folders before it stay installed.
    """
    for needs in missing_needs(base, site, folders):
        for venv in _venvs(base):
            is_new = not (venv / "bin" / "python").exists()
            if not is_new and not _fits(venv, nemo_gym, needs):
                continue
            try:
                if is_new:
                    make(venv)
                _add(venv, nemo_gym, needs, say)
                seal(venv)
            except ServiceError as error:
                if is_new and venv != base:
                    shutil.rmtree(venv, ignore_errors=True)
                raise UnmetNeeds(needs.folder, _explained(needs, str(error))) from None
            break


def missing_needs(base: Path, site: Path, folders: Iterable[str]) -> list[Needs]:
    """Returns the requirements that no venv has yet."""
    return [needs for needs in needs_of(folders, site) if _venv_of(base, needs) is None]


def venvs_of(base: Path, site: Path, folders: Iterable[str]) -> set[Path]:
    """Returns the venvs beside `base` that have the requirements of some of the folders."""
    found = (_venv_of(base, needs) for needs in needs_of(folders, site))
    return {venv for venv in found if venv and venv != base}


def python_of(folder: str, python: Path, site: Path) -> Path:
    """Returns the interpreter with the requirements of a server's folder. python: the one that has NeMo Gym,
    which a folder without requirements gets; an interpreter of the user's own has those of all folders."""
    for needs in needs_of([folder], site):
        if venv := _venv_of(python.parent.parent, needs):
            return venv / "bin" / "python"
    return python


def check_own_python(python: Path, site: Path, folders: Iterable[str], say: Say) -> None:
    """Raises ConfigError that names what an interpreter of the user's own lacks for the folders. Another
    version than a folder asks for is only told, as the user may have chosen it."""
    needed = missing_needs(python.parent.parent, site, folders)
    installed = _installed(python) if needed else {}
    lacking: list[str] = []
    for needs in needed:
        gone = []
        for line in needs.lines:
            if line.startswith("-"):  # an option of pip's
                continue
            try:
                wanted = Requirement(line)
            except InvalidRequirement:
                say(f"warning: {needs.folder} asks for {line}, and gymexp cannot tell if {python} has it")
                continue
            if wanted.marker and not wanted.marker.evaluate(dict(installed["markers"])):
                continue
            version = installed["versions"].get(canonicalize_name(wanted.name))
            if version is None:
                gone.append(line)
            elif not wanted.specifier.contains(version, prereleases=True):
                say(f"warning: {needs.folder} asks for {line}, but {python} has {version}")
        if gone:
            lacking.append(f"  {needs.folder}: {' '.join(gone)}")
    if lacking:
        raise ConfigError(
            f"{python} (gym.python) lacks what servers need. Install it there, or leave gym.python out:\n"
            + "\n".join(lacking)
        )


def _venvs(base: Path) -> Iterator[Path]:
    """Yields the venvs in order; those after the last one that exists have yet to be made."""
    yield base
    if not base.name:  # an interpreter of the user's own may lie anywhere
        return
    yield from (base.with_name(f"{base.name}-{number}") for number in itertools.count(2))


def _venv_of(base: Path, needs: Needs) -> Path | None:
    for venv in _venvs(base):
        if not (venv / "bin" / "python").exists():
            return None
        if (venv / needs.marker).exists():
            return venv
    return None


def _fits(venv: Path, nemo_gym: str, needs: Needs) -> bool:
    """Returns whether uv finds versions for all that the venv has and for `needs`. Raises UnmetNeeds if uv
    fails for another reason, e.g. as there is no network."""
    files = _files(venv, needs)
    given = "\n".join(needs.lines) + "\n"
    arguments = ["pip", "install", "--dry-run", "--quiet", "--python", venv / "bin" / "python", nemo_gym]
    done = uv(*arguments, *files, "-r", "-", given=given)
    if done.returncode and _CONFLICT not in done.stderr:
        raise UnmetNeeds(needs.folder, _explained(needs, done.stderr.strip()))
    return not done.returncode


def _add(venv: Path, nemo_gym: str, needs: Needs, say: Say) -> None:
    beside = "" if venv.name == nemo_gym.replace("==", "-") else f" in {venv}"
    say(f"adding what {needs.folder} needs{beside}: {' '.join(needs.lines)}")
    files, marker = _files(venv, needs), venv / needs.marker
    part = marker.with_name(f"{marker.name}.part")
    part.write_text("\n".join(needs.lines) + "\n", encoding="utf-8")
    try:
        install(venv / "bin" / "python", nemo_gym, *files, "-r", part)
        part.rename(marker)
    finally:
        part.unlink(missing_ok=True)
    for older in venv.glob(f"{marker_prefix(needs.folder)}*"):
        if older != marker:
            older.unlink()  # of an earlier version of the folder


def _files(venv: Path, needs: Needs) -> list[str]:
    """Returns uv's arguments for the requirements that the venv has, without those of the same folder."""
    own = marker_prefix(needs.folder)
    markers = sorted(path for path in venv.glob("needs-*") if not path.name.startswith(own))
    return [argument for path in markers for argument in ("-r", str(path))]


def _explained(needs: Needs, error: str) -> str:
    if not needs.elsewhere:
        return error
    return (
        f"{', '.join(needs.elsewhere)}, which no package registry has: it must be reached over the network. "
        f"Where this machine cannot, use gym.python with an interpreter that has it. {error}"
    )


_ASK = """
import json, platform, sys
from importlib.metadata import distributions
versions = {d.metadata["Name"]: d.version for d in reversed(list(distributions())) if d.metadata["Name"]}
full = platform.python_version()
markers = {"python_version": ".".join(full.split(".")[:2]), "python_full_version": full}
json.dump({"versions": versions, "markers": markers}, sys.stdout)
"""


def _installed(python: Path) -> dict[str, dict[str, str]]:
    """Returns the packages that an interpreter itself finds, wherever they lie: "versions" by normalized
    name; and its own "markers" of requirements."""
    done = subprocess.run([python, "-P", "-c", _ASK], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{python} (gym.python) cannot list its packages: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout)
    found["versions"] = {canonicalize_name(name): version for name, version in found["versions"].items()}
    return found
