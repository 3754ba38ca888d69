"""`env.<name>.like=<other>` begins an environment with the keys of another one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from test_catalogue_source import CATALOGUE

from gymexp.cli import catalogue_source, variants
from gymexp.config.group_options import CONF_DIR
from gymexp.config.hydra_schema import register
from gymexp.config.load import from_yaml, load, to_yaml
from gymexp.config.schema import RunConfig
from gymexp.errors import ConfigError


@pytest.fixture(autouse=True)
def catalogue(monkeypatch):
    monkeypatch.setattr(catalogue_source, "load_catalogue", lambda *_: CATALOGUE)
    monkeypatch.setattr(catalogue_source, "_catalogues", {})
    register()
    catalogue_source.register()
    variants.register()


def composed(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return load(compose("train", overrides=list(overrides)))


@pytest.fixture
def own(tmp_path):
    """Writes files of the user's own; gives the override that has Hydra find them."""

    def write(**files: str) -> str:
        for path, text in files.items():
            group, name = path.split("__")
            (tmp_path / group).mkdir(exist_ok=True)
            (tmp_path / group / f"{name}.yaml").write_text(text)
        return f"hydra.searchpath=['file://{tmp_path}']"

    return write


COUNTDOWN = ("env.countdown.like=sudoku", "env.countdown.data.options.task=countdown")


def test_several_variants_play_beside_the_environment_that_they_are_like():
    config = composed(*COUNTDOWN, "env.tower.like=sudoku", "env.tower.data.options.task=tower_of_hanoi")
    tasks = {name: env.data.options["task"] for name, env in config.env.items()}
    assert tasks == {"sudoku": "mini_sudoku", "countdown": "countdown", "tower": "tower_of_hanoi"}
    assert len({env.config_path for env in config.env.values()}) == 1
    assert config.env["countdown"].like == "sudoku"


def test_a_variant_has_the_option_and_nothing_that_is_set_about_the_other():
    config = composed("env=[sudoku]", *COUNTDOWN, "env.sudoku.weight=5", "env.countdown.max_steps=null")
    assert (config.env["sudoku"].weight, config.env["countdown"].weight) == (5, 1)
    assert config.env["sudoku"].max_steps == 1
    assert config.env["countdown"].max_steps is None, "set to what is the default of other environments"


def test_only_variants_may_be_played_also_of_the_catalogue_and_with_a_plus():
    config = composed("env=[]", "+env.blitz.like=chess", "env.blitz.timeout_s=9", "env.slow={like: chess}")
    assert list(config.env) == ["blitz", "slow"]
    assert [env.agent for env in config.env.values()] == 2 * ["chess_agent"]
    assert config.env["blitz"].timeout_s == 9


def test_files_of_the_users_name_variants_and_one_may_be_like_another(own):
    path = own(
        env__zebra="# @package env.zebra\nlike: sudoku\nweight: 2\ndata: {options: {task: zebra_puzzles}}\n",
        experiment__mine=(
            "# @package _global_\ndefaults:\n  - override /env: [zebra]\n"
            "env:\n  small: {like: zebra, data: {train_size: 5}}\n  go2: {like: go}\n"
        ),
    )
    config = composed(path, "experiment=mine", "env.small.data.validation_size=3")
    small, zebra = config.env["small"], config.env["zebra"]
    assert small.data.options["task"] == zebra.data.options["task"] == "zebra_puzzles"
    assert (small.weight, small.data.train_size, small.data.validation_size) == (2, 5, 3)
    assert (zebra.data.train_size, zebra.max_steps, small.like) == (2000, 1, "zebra")
    assert config.env["go2"].agent == "go_agent"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["env.a.like=sudok"], r"env\.a\.like=sudok: env=sudok is not known; did you mean env=sudoku"),
        (["env.a.like=a"], r"env\.a\.like=a must name another environment: a is like a$"),
        (
            ["env=[sudoku,small]", "env.small.like=sudoku"],
            r"^env=\[…,small\] must leave small out: env\.small\.like=sudoku plays it beside those of the "
            r"list\. A sweep .* needs a file env/small\.yaml in --config-dir, with like: sudoku$",
        ),
        (
            ["env=small", "+env.small={like: go}"],
            r"^env=\[…,small\] must leave small out: env\.small\.like=go",
        ),
        (["env=[smal]", "env.small.like=go"], r"Could not load 'env/smal'"),
        (["env.sudoku.like=go"], r"env\.sudoku\.like=go must be of a name that env=\[…\] leaves out"),
        (
            ["env.a.like=b", "env.b.like=go"],
            r"env\.a\.like=b must .* b is a variant: say like=go",
        ),
    ],
)
def test_a_name_that_cannot_be_followed_is_answered(overrides, said):
    with pytest.raises((ConfigError, MissingConfigException), match=said):
        composed(*overrides)


def test_a_sweep_over_a_list_that_names_a_variant_is_answered():
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        asked = ["env=[sudoku],[sudoku,small]", "env.small.like=sudoku"]
        master = loader.load_configuration("train", asked, RunMode.MULTIRUN)
        with pytest.raises(ConfigError, match=r"^env=\[…,small\] must leave small out: "):
            load_job(loader, master, "env=[sudoku,small]", "env.small.like=sudoku")


def test_a_sweep_plays_a_variant_of_a_file_in_some_jobs(own, tmp_path):
    path = own(env__small="# @package env.small\nlike: sudoku\nweight: 2\n")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        asked = [path, "env=[sudoku],[sudoku,small]"]
        master = loader.load_configuration("train", asked, RunMode.MULTIRUN)
        jobs = [load_job(loader, master, path, f"env=[{names}]") for names in ("sudoku", "sudoku,small")]
    assert [set(job.env) for job in jobs] == [{"sudoku"}, {"sudoku", "small"}]
    assert jobs[1].env["small"].config_path == jobs[1].env["sudoku"].config_path


def test_a_circle_of_files_and_a_defaults_list_are_named(own):
    files = {f"env__{a}": f"# @package env.{a}\nlike: {b}\n" for a, b in ("xy", "yz", "zx")}
    path = own(**files, env__deep="# @package env.deep\ndefaults: [sudoku]\n")
    with pytest.raises(ConfigError, match="must name another environment: x is like y is like z is like x"):
        composed(path, "env=[x]")
    with pytest.raises(ConfigError, match=r"env\.a\.like=deep must name a file without a defaults list"):
        composed(path, "env.a.like=deep")


def test_each_job_of_a_sweep_has_its_own_variant(tmp_path: Path):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("train", ["env.a.like=go,chess", "seed=1"], RunMode.MULTIRUN)
        jobs = [load_job(loader, master, f"env.a.like={like}") for like in ("go", "chess")]
    assert [job.env["a"].agent for job in jobs] == ["go_agent", "chess_agent"]
    (tmp_path / "config.yaml").write_text(to_yaml(jobs[1]))
    assert from_yaml(tmp_path / "config.yaml") == jobs[1], "a resumed run needs no other environment"


def load_job(loader, master, *overrides: str) -> RunConfig:
    job = loader.load_sweep_config(master, list(overrides))
    del job._content["hydra"]
    return load(job)
