"""Which venv has what a server needs: real venvs and uv's own resolver, with packages made here."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gymexp.config.schema import EnvConfig, GymConfig
from gymexp.errors import ConfigError, ServiceError
from gymexp.gym import install
from gymexp.gym.definitions import ensure_environments
from gymexp.gym.install import ensure_python, site_packages
from gymexp.gym.requirements import needs_of
from gymexp.gym.server_plan import Layout
from gymexp.gym.server_venvs import python_of
from gymexp.run.services import by_interpreter

NEEDS = {
    "old": "-e nemo-gym[dev] @ ../../\n# a comment\nbeads==1.0\n",
    "new": "beads==2.0\n",
    "any": "beads\nstring\n",
    "client": "wire\n",  # NeMo Gym itself takes no wire from 2.0 on
    "remote": "yarn @ git+https://nowhere.invalid/yarn.git\n",
}
AGENT = "a_{0}:\n  responses_api_agents:\n    walker:\n      entrypoint: app.py\n"
AGENT += "      resources_server: {{type: resources_servers, name: r_{0}}}\n"
AGENT += "      model_server: {{type: responses_api_models, name: policy_model}}\n"
AGENT += "r_{0}:\n  resources_servers:\n    {0}: {{entrypoint: app.py}}\n"


def make_wheel(folder: Path, name: str, version: str, requires: str = "", **files: str) -> None:
    about = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    content = files | {
        f"{name}/__init__.py": "",
        f"{about}/METADATA": metadata,
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*content, f"{about}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in (content | {f"{about}/RECORD": record}).items():
            wheel.writestr(path, text)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    servers = {f"resources_servers/{name}/requirements.txt": text for name, text in NEEDS.items()}
    servers |= {f"resources_servers/{name}/configs/{name}.yaml": AGENT.format(name) for name in NEEDS}
    project = '[project]\nname = "of_project"\ndependencies = ["nemo-gym[dev]", "string>=1"]\n'
    servers["resources_servers/of_project/pyproject.toml"] = project
    make_wheel(folder, "nemo_gym", "0.4.0", "wire<2", **servers)
    for name, *versions in (("httptools", "1.0"), ("string", "1.0")):
        make_wheel(folder, name, *versions)
    for name in ("wire", "beads"):
        for version in ("1.0", "2.0"):
            make_wheel(folder, name, version)
    return folder


@pytest.fixture
def cache(tmp_path, wheels, monkeypatch) -> Path:
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(wheels))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setattr(install, "find_python", lambda *_: sys.executable)
    return tmp_path / "cache"


def ensure(cache: Path, *names: str, say=lambda text: None, gym=None) -> dict[str, Path]:
    """Returns each server's interpreter."""
    folders = {name: f"resources_servers/{name}" for name in names}
    python = ensure_python(gym or GymConfig(), lambda _: folders.values(), cache, say)
    site = site_packages(python)
    return {name: python_of(folder, python, site) for name, folder in folders.items()}


def version(python: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_servers_whose_requirements_conflict_have_a_venv_each_and_others_share_the_first(cache):
    said: list[str] = []
    found = ensure(cache, "old", "new", "any", say=said.append)
    venvs = {name: python.parent.parent.name for name, python in found.items()}
    assert venvs == {"any": "nemo-gym-0.4.0", "new": "nemo-gym-0.4.0", "old": "nemo-gym-0.4.0-2"}
    assert {name: version(python, "beads") for name, python in found.items()} == {
        "any": "2.0",
        "new": "2.0",
        "old": "1.0",
    }
    assert version(found["old"], "nemo_gym") == "0.4.0", "each venv has NeMo Gym"
    layout = Layout(modules={f"x-{name}": f"resources_servers.{name}.app" for name in ("old", "new", "bare")})
    sockets: dict[str, Any] = {name: name for name in layout.modules}
    site = site_packages(found["new"])
    assert by_interpreter(layout, found["new"], site, sockets) == {
        found["new"]: {"x-new": "x-new", "x-bare": "x-bare"},
        found["old"]: {"x-old": "x-old"},
    }, "a host for each"
    count = len(said)
    assert ensure(cache, "old", "new", "any", say=said.append) == found
    assert len(said) == count, "nothing is installed twice"


def test_a_venv_stays_whole_when_the_requirements_of_a_later_folder_cannot_be_installed(cache):
    venv = ensure(cache, "any")["any"].parent.parent
    with pytest.raises(ServiceError, match="remote needs what could not be installed"):
        ensure(cache, "old", "remote")
    assert version(venv / "bin" / "python", "beads") == "1.0", "the requirements of `old` were installed"
    said: list[str] = []
    ensure(cache, "old", "any", say=said.append)
    assert not said, "nothing is missing, and no venv is made again"


def test_a_requirement_never_gives_nemo_gym_a_package_that_it_does_not_take(cache):
    assert version(ensure(cache, "client")["client"], "wire") == "1.0"


def test_a_folder_with_a_pyproject_has_its_dependencies(cache):
    assert version(ensure(cache, "of_project")["of_project"], "string") == "1.0"


def test_a_second_venv_that_lost_files_is_made_anew_with_what_it_had(cache):
    old = ensure(cache, "new", "old")["old"]
    site = next((old.parent.parent / "lib").glob("python*/site-packages"))
    (site / "beads" / "__init__.py").unlink()
    (site / "beads-1.0.dist-info" / "RECORD").unlink()
    said: list[str] = []
    assert ensure(cache, "new", "old", say=said.append)["old"] == old
    assert any("RECORD is missing" in line for line in said)
    assert version(old, "beads") == "1.0"


def test_requirements_that_change_are_installed_anew_and_the_old_ones_no_longer_count(
    cache, tmp_path, monkeypatch
):
    folder = tmp_path / "mine" / "resources_servers" / "own"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    for pin in ("1.0", "2.0"):
        (folder / "requirements.txt").write_text(f"beads=={pin}\n")
        python = ensure(cache, "own")["own"]
        assert (python.parent.parent.name, version(python, "beads")) == ("nemo-gym-0.4.0", pin)


def test_a_requirement_from_a_repository_that_cannot_be_reached_is_named_with_its_environment(cache):
    path = "resources_servers/remote/configs/remote.yaml"
    envs = {"weaver": EnvConfig(config_path=path, agent="a_remote")}
    said = (
        r"env\.weaver cannot be played: resources_servers/remote needs .*git\+https://nowhere\.invalid/yarn"
    )
    with pytest.raises(ServiceError, match=said + r"\.git, which no package registry has.* gym\.python"):
        ensure_environments(GymConfig(), envs, cache, print)


def test_an_interpreter_of_the_users_own_is_told_what_it_lacks(cache, tmp_path):
    python = ensure(cache, "new")["new"]
    own = tmp_path / "own"
    python.parent.parent.rename(own)
    for marker in own.glob("needs-*"):
        marker.unlink()
    gym = GymConfig(python=str(own / "bin" / "python"))
    said: list[str] = []
    with pytest.raises(ConfigError) as caught:
        ensure(cache, "old", "any", gym=gym, say=said.append)
    assert str(caught.value).splitlines()[1:] == ["  resources_servers/any: string"]
    assert re.search(r"old asks for beads==1\.0, but .* has 2\.0", said[0]), "the user's choice is only told"
    assert ensure(cache, "new", gym=gym) == {"new": own / "bin" / "python"}
    assert version(own / "bin" / "python", "beads") == "2.0", "nothing is installed there"


def test_an_interpreter_of_the_users_own_may_find_its_packages_anywhere(cache, tmp_path):
    venv = ensure(cache, "new")["new"].parent.parent
    packages = tmp_path / "packages"  # as of `pip install --target`
    next(venv.glob("lib/*/site-packages")).rename(packages)
    own = tmp_path / "bin" / "own-python"
    own.parent.mkdir()
    own.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" -S "$@"\n')
    own.chmod(0o755)
    gym = GymConfig(python=str(own))
    assert ensure(cache, "new", gym=gym) == {"new": own}
    with pytest.raises(ConfigError, match=r"lacks what servers need[^\n]*\n  resources_servers/any: string$"):
        ensure(cache, "any", gym=gym)
    site = site_packages(own)
    in_root = Path("/own-python"), Path("/opt/own-python")
    assert [python_of("resources_servers/old", python, site) for python in in_root] == [*in_root]


def test_what_an_interpreter_of_the_users_own_cannot_tell_is_only_said(cache, tmp_path):
    python = ensure(cache, "new")["new"]
    folder = site_packages(python) / "resources_servers" / "loose"
    folder.mkdir()
    lines = (
        "git+https://nowhere.invalid/yarn.git",
        "beads; python_version < '3'",
        "string; python_version < '3'",
    )
    (folder / "requirements.txt").write_text("\n".join(lines))
    said: list[str] = []
    gym = GymConfig(python=str(python))
    ensure_python(gym, lambda _: ["resources_servers/loose"], cache, said.append)
    [warning] = said
    assert "asks for git+https://nowhere.invalid/yarn.git, and gymexp cannot tell" in warning


def test_the_lines_of_a_requirements_txt_are_passed_on_as_they_are(tmp_path):
    folder = tmp_path / "resources_servers" / "x"
    folder.mkdir(parents=True)
    lines = "-e nemo-gym @ ../..", "--extra-index-url https://one.example/simple", "# none", "", "beads[x]>1"
    (folder / "requirements.txt").write_text("\n".join(lines))
    [needs] = needs_of(["resources_servers/x"], tmp_path)
    assert needs.lines == ("--extra-index-url https://one.example/simple", "beads[x]>1")
    assert needs.elsewhere == []


def test_a_dependency_comes_from_the_repository_that_the_pyproject_names(tmp_path):
    """A registry may have another package of that name, as of NeMo Gym's code_fim (human-eval-infilling)."""
    folder = tmp_path / "resources_servers" / "x"
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text("""
[project]
dependencies = ["nemo-gym[dev]", "big-beads>=1", "yarn", "thread"]
[tool.uv.sources]
nemo-gym = { path = "../.." }
big_beads = { git = "https://one.example/beads.git", tag = "v1" }
yarn = { url = "https://one.example/yarn.whl" }
""")
    [needs] = needs_of(["resources_servers/x"], tmp_path)
    repository, file = "git+https://one.example/beads.git@v1", "https://one.example/yarn.whl"
    assert needs.lines == (f"big-beads @ {repository}", f"yarn @ {file}", "thread")
    assert needs.elsewhere == [repository, file]
