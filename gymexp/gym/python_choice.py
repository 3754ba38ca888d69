"""The Python of NeMo Gym's venv: one that the wheel of the wanted version takes, by its Requires-Python.

uv fetches the wheel from the package index that it is configured for, once for each version; the install
afterwards takes it from uv's cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from gymexp.errors import ConfigError, ServiceError
from gymexp.files import replace_file
from gymexp.gym.uv_calls import uv

_ANY_PYTHON = "3.99"  # newer than any Requires-Python asks for
_VERSION_CODE = "import sys; print('%d.%d.%d' % sys.version_info[:3])"


def find_python(version: str, cache: Path) -> str:
    """Returns a Python that nemo-gym of this version takes: from PATH, from pyenv, or from uv, which may
    download it. Of those that fit it is one of the lowest minor version, as NeMo Gym is developed on that.

    Raises ConfigError if there is none, and ServiceError if uv cannot fetch nemo-gym.
    """
    required = required_python(version, cache)
    for path in _candidates(required):
        if (found := _version_of(path)) and required.contains(found, prereleases=True):
            return path
    lowest = _lowest_minor(required)
    wanted = ",".join(filter(None, (str(required), f"=={lowest}.*")))
    result = uv("python", "find", "--no-project", str(required) or ">=3")
    if result.returncode and not (result := uv("python", "install", wanted)).returncode:
        result = uv("python", "find", "--no-project", "--managed-python", wanted)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1].strip()
        raise ConfigError(
            f"NeMo Gym {version} needs Python {required}: none is on PATH or under pyenv, and uv could not "
            f"fetch one ({last}). Install such a Python, or set gym.python to an interpreter that has "
            f"nemo-gym=={version} installed"
        )
    return result.stdout.strip()


def required_python(version: str, cache: Path) -> SpecifierSet:
    """Returns the Requires-Python of nemo-gym's wheel, from the cache if it has it. Raises ServiceError if uv
    cannot fetch the wheel."""
    if (kept := kept_required_python(version, cache)) is not None:
        return kept
    with tempfile.TemporaryDirectory(dir=cache, prefix="wheel-") as folder:
        options = ("--quiet", "--no-deps", "--target", folder, "--python-version", _ANY_PYTHON)
        wanted = f"nemo-gym=={version}"
        result = uv("pip", "install", *options, "--python", sys.executable, wanted)
        if result.returncode:
            raise ServiceError(f"uv could not fetch {wanted}:\n{result.stderr.strip()}")
        [metadata] = Path(folder).glob("nemo_gym-*.dist-info/METADATA")
        text = HeaderParser().parsestr(metadata.read_text(encoding="utf-8")).get("Requires-Python", "")
    replace_file(_kept(version, cache), f"{text}\n")
    return SpecifierSet(text)


def kept_required_python(version: str, cache: Path) -> SpecifierSet | None:
    """Returns what the cache has of `required_python`, or None."""
    try:
        return SpecifierSet(_kept(version, cache).read_text(encoding="utf-8").strip())
    except (OSError, InvalidSpecifier):
        return None


def _kept(version: str, cache: Path) -> Path:
    return cache / f"nemo-gym-{version}.requires-python"


def _candidates(required: SpecifierSet) -> Iterator[str]:
    """Yields interpreters whose minor version may fit, those of the lowest one first."""
    found: list[tuple[int, str]] = []
    for folder in os.get_exec_path():
        for path in sorted(Path(folder).glob("python3.*")):
            if (match := re.fullmatch(r"python3\.(\d+)", path.name)) and shutil.which(path):
                found.append((int(match[1]), str(path)))
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    installed = [(match, path) for path in pyenv.glob("3.*/bin/python") if (match := _minor_of(path))]
    for (minor, _), path in sorted(installed, reverse=True):
        found.append((minor, str(path)))
    for minor, path in sorted(found, key=lambda one: one[0]):
        if any(required.contains(f"3.{minor}.{patch}") for patch in range(100)):
            yield path


def _minor_of(python: Path) -> tuple[int, int] | None:
    """Returns the minor and the patch version in the name of pyenv's folder of an interpreter."""
    match = re.fullmatch(r"3\.(\d+)\.(\d+)", python.parent.parent.name)
    return (int(match[1]), int(match[2])) if match else None


def _lowest_minor(required: SpecifierSet) -> str:
    """Returns e.g. 3.13 for >=3.13.14."""
    lowest = max((Version(s.version) for s in required if s.operator in (">=", "~=", ">")), default=None)
    return f"{lowest.major}.{lowest.minor}" if lowest else f"3.{sys.version_info.minor}"


def _version_of(python: str) -> str:
    """Returns an interpreter's version, e.g. 3.13.14; "" if it cannot run."""
    process = subprocess.run([python, "-c", _VERSION_CODE], capture_output=True, text=True, check=False)
    said = process.stdout.strip()
    return said if process.returncode == 0 and re.fullmatch(r"\d+\.\d+\.\d+", said) else ""
