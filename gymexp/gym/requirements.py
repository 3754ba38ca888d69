"""What a server's own folder says that it needs: its requirements.txt, or its pyproject.toml."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gymexp.errors import ConfigError
from gymexp.record.places import own_servers

_NEMO_GYM = re.compile(r"nemo[-_.]gym\b", re.I)
# A requirement that no registry has: of a git repository, or of a file by its URL.
_ELSEWHERE = re.compile(r"(git\+|https?://)\S+")


@dataclass(frozen=True)
class Needs:
    """Requirements of a server's folder, e.g. resources_servers/mcqa. lines: as a requirements.txt has
    them, without those for NeMo Gym itself, which every venv has."""

    folder: str
    lines: tuple[str, ...]

    @property
    def marker(self) -> str:
        """The name of the file in a venv that has the requirements, with `lines` in it."""
        digest = hashlib.sha256("\n".join(self.lines).encode()).hexdigest()[:12]
        return f"{marker_prefix(self.folder)}{digest}"

    @property
    def elsewhere(self) -> list[str]:
        """The addresses that uv must reach for them beside a package registry."""
        options = ("--extra-index-url", "--index-url", "--find-links")
        lines = (line for line in self.lines if not line.startswith(options))
        return [found.group() for line in lines for found in _ELSEWHERE.finditer(line)]


def marker_prefix(folder: str) -> str:
    """Returns how the names of a folder's markers begin, whatever its requirements are."""
    return f"needs-{folder.replace('/', '-')}-"


def needs_of(folders: Iterable[str], site: Path) -> Iterator[Needs]:
    """Yields the requirements of each folder that has some. A folder of the user's own comes before NeMo
    Gym's. site: the directory of NeMo Gym's folders. Raises ConfigError if a file cannot be read."""
    for folder in sorted(set(folders)):
        own = own_servers() / folder
        at = own if any((own / name).exists() for name in _READERS) else site / folder
        for name, read in _READERS.items():
            if (path := at / name).exists():
                try:
                    lines = tuple(read(path.read_text(encoding="utf-8")))
                except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ConfigError(f"{path} cannot be read: {error}") from None
                if any(not line.startswith("-") for line in lines):
                    yield Needs(folder, lines)
                break


def _of_requirements_txt(text: str) -> Iterator[str]:
    for line in map(str.strip, text.splitlines()):
        if line and not line.startswith(("#", "-e")) and "../.." not in line:
            yield line


def _of_pyproject_toml(text: str) -> Iterator[str]:
    """Yields the dependencies, from the repositories that `tool.uv.sources` names, as a registry may have
    other packages of these names."""
    project = tomllib.loads(text)
    sources = project.get("tool", {}).get("uv", {}).get("sources", {})
    by_name = {canonicalize_name(name): source for name, source in sources.items()}
    for line in map(str, project.get("project", {}).get("dependencies", ())):
        if _NEMO_GYM.match(line):
            continue
        name = Requirement(line).name
        source = by_name.get(canonicalize_name(name), {})
        if "git" in source:
            commit = next((f"@{source[key]}" for key in ("rev", "tag", "branch") if key in source), "")
            folder = f"#subdirectory={source['subdirectory']}" if "subdirectory" in source else ""
            line = f"{name} @ git+{source['git']}{commit}{folder}"
        elif "url" in source:
            line = f"{name} @ {source['url']}"
        yield line


_READERS = {"requirements.txt": _of_requirements_txt, "pyproject.toml": _of_pyproject_toml}
