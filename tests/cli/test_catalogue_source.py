"""NeMo Gym's environments as options of `env`, with a catalogue of two made-up ones in its place."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf

from gymexp.cli import catalogue_source
from gymexp.config.group_options import CONF_DIR
from gymexp.config.hydra_schema import register
from gymexp.config.load import load
from gymexp.config.schema import EnvConfig
from gymexp.gym.catalogue import Entry


def entry(name: str, **more) -> Entry:
    facts = {"harness": "simple_agent", "max_steps": None} | more
    return Entry(
        name=name,
        config_path=f"resources_servers/{name}/configs/{name}.yaml",
        agent=f"{name}_agent",
        folders=[f"resources_servers/{name}"],
        domain="games",
        description="",
        datasets=[],
        examples=None,
        **facts,
    )


CATALOGUE = {
    "chess": entry("chess", tools=["move"]),
    "go": entry("go"),
    "tetris": entry("tetris", harness="gymnasium_agent", max_steps=20),
    "sudoku": entry("sudoku"),
}


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str | None]]:
    """The version and the interpreter of each NeMo Gym whose catalogue is read."""
    asked = []

    def load_catalogue(gym, cache, say):
        asked.append((gym.version, gym.python))
        return CATALOGUE

    monkeypatch.setattr(catalogue_source, "load_catalogue", load_catalogue)
    monkeypatch.setattr(catalogue_source, "_catalogues", {})
    return asked


def composed(*overrides: str, folder: str = str(CONF_DIR)):
    register()
    catalogue_source.register()
    with initialize_config_dir(folder, version_base="1.3"):
        return compose("train", overrides=list(overrides))


def test_environments_of_nemo_gym_are_taken_by_name_and_keys_may_change_them(asked):
    config = load(composed("env=[sudoku,tetris,chess,go]", "env.tetris.weight=3"))
    assert list(config.env) == ["sudoku", "tetris", "chess", "go"]
    assert config.env["tetris"].config_path == "resources_servers/tetris/configs/tetris.yaml"
    assert config.env["tetris"].agent == "tetris_agent" and config.env["tetris"].weight == 3
    assert {env.data.source for env in config.env.values()} == {"generate", "nemo_gym"}
    steps = {name: env.max_steps for name, env in config.env.items()}
    assert steps == {"sudoku": 1, "tetris": None, "chess": 10, "go": 1}
    assert len(asked) == 1, "the catalogue is read once"


@pytest.mark.parametrize("name", ["sudoku", "workplace"])
def test_gymexps_own_environments_are_composed_of_their_files_alone(name, asked):
    own = OmegaConf.merge(OmegaConf.structured(EnvConfig), OmegaConf.load(CONF_DIR / "env" / f"{name}.yaml"))
    assert composed(f"env=[{name}]").env == {name: own}
    assert not asked, "no catalogue is read"


def test_a_file_of_the_users_goes_before_the_catalogue(asked, tmp_path):
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "go.yaml").write_text(
        "# @package env.go\nconfig_path: mine.yaml\nagent: mine\ndata: {source: nemo_gym}\n"
    )
    config = load(composed("env=[go,chess]", f"hydra.searchpath=['file://{tmp_path}']"))
    assert [env.agent for env in config.env.values()] == ["mine", "chess_agent"]


def test_the_catalogue_is_that_of_the_nemo_gym_of_the_run(asked, tmp_path):
    composed("env=[go]", "gym.version=0.7.0")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /env: [go]\ngym: {python: /opt/python}\n"
    )
    config = load(composed("experiment=mine", f"hydra.searchpath=['file://{tmp_path}']"))
    assert asked == [("0.7.0", None), ("0.4.0", "/opt/python")]
    assert list(config.env) == ["go"] and config.gym.python == "/opt/python"


def test_each_job_of_a_sweep_gets_its_own(asked):
    register()
    catalogue_source.register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        from hydra.types import RunMode

        master = loader.load_configuration("train", ["env=[go],[chess,sudoku]"], RunMode.MULTIRUN)
        jobs = [loader.load_sweep_config(master, [f"env={names}"]) for names in ("[go]", "[chess,sudoku]")]
    assert [list(job.env) for job in jobs] == [["go"], ["chess", "sudoku"]]


def test_an_unknown_name_is_answered_with_the_nearest_ones(asked):
    with pytest.raises(Exception, match="env/tetriss"):
        composed("env=[tetriss]")
    text = catalogue_source.explain_unknown("tetriss")
    assert text.startswith("env=tetriss is not known; did you mean env=tetris")
    assert "Known: sudoku, workplace" in text and "python -m gymexp.envs --search TEXT" in text


@pytest.mark.parametrize("name", ["sudko", "Sudoku"])
def test_no_catalogue_is_made_for_a_misspelled_file(name, asked, monkeypatch):
    monkeypatch.setattr(catalogue_source, "kept_catalogue", lambda gym, cache: {})
    with pytest.raises(Exception, match=f"env/{name}"):
        composed(f"env=[{name}]")
    assert not asked


def test_completion_lists_what_the_cache_has_and_installs_nothing(asked, monkeypatch):
    monkeypatch.setattr(catalogue_source, "kept_catalogue", lambda gym, cache: CATALOGUE)
    source = catalogue_source.CatalogueSource("NeMo Gym", "nemo-gym://")
    assert source.list("env", ObjectType.CONFIG) == ["chess", "go", "tetris", "sudoku"]
    assert source.list("model", None) == [] == source.list("env", ObjectType.GROUP)
    assert not asked


@pytest.mark.gym
def test_the_command_composes_a_real_one_and_answers_a_typo(gym_python):
    command = [sys.executable, "-m", "gymexp.train", "--cfg", "job", "--package", "env"]
    shown = subprocess.run([*command, "env=[blackjack]"], capture_output=True, text=True, check=True).stdout
    assert "agent: blackjack_gymnasium_agent" in shown
    wrong = subprocess.run([*command, "env=[blackjak]"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1 and "did you mean env=blackjack" in wrong.stderr
