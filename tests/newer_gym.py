"""A newer NeMo Gym than gymexp's default, for tests: `pytest --gym-version 0.7.0`.

Where no Python fits its Requires-Python, and none can be downloaded, any Python 3.13 has to do: uv installs
the wheel as for the Python that it asks for. Users cannot have this; gymexp refuses and names gym.python.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from gymexp.errors import ConfigError
from gymexp.gym.python_choice import find_python, required_python
from gymexp.gym.uv_calls import uv

OLDER = "3.13"  # the tests' way out


def newer_cache(version: str, cache: Path) -> Path:
    """Returns the cache with this version's venv, which is gymexp's own cache where a Python fits.

    In that cache gym.version alone takes the venv, and adds what servers need. Skips the test if there is no
    Python for it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"test-nemo-gym-{version}.lock"):  # two workers of pytest ask at once
        return _cache_of(version, cache)


def _cache_of(version: str, cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UV_PYTHON_DOWNLOADS", "never")
        try:
            find_python(version, cache)
            return cache
        except ConfigError:
            pass
    required = required_python(version, cache)
    found = uv("python", "find", "--no-project", "--system", OLDER).stdout.strip()
    found = found or next(map(str, Path.home().glob(f".pyenv/versions/{OLDER}.*/bin/python")), "")
    if not found:
        pytest.skip(f"nemo-gym {version} needs Python {required}, and these tests a Python {OLDER} at least")
    own = cache / f"python-{OLDER}"
    venv = own / f"nemo-gym-{version}"
    own.mkdir(exist_ok=True)
    if not (venv / "complete").exists():
        _uv("venv", "--quiet", "--clear", "--python", found, venv)
        [lowest] = [one.version for one in required if one.operator == ">="]
        packages = (f"nemo-gym=={version}", "httptools")
        _uv("pip", "install", "--quiet", "--python", _python(venv), "--python-version", lowest, *packages)
        # uv, which adds the requirements of servers, takes the installed package for this Python's then.
        [metadata] = venv.glob(f"lib/*/site-packages/nemo_gym-{version}.dist-info/METADATA")
        text, told = metadata.read_text(encoding="utf-8"), f"Requires-Python: >={lowest}"
        assert told in text
        older = f"Requires-Python: >={OLDER}".ljust(len(told))  # a shorter file would be a damaged one
        metadata.unlink()  # which is uv's own in its cache too
        metadata.write_text(text.replace(told, older), encoding="utf-8")
        (venv / "complete").touch()
    return own


def _python(venv: Path) -> Path:
    return venv / "bin" / "python"


def _uv(*arguments: str | Path) -> None:
    done: subprocess.CompletedProcess[str] = uv(*arguments)
    assert done.returncode == 0, done.stderr
