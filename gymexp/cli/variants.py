"""Variants of environments: `env.<name>.like=<other>`, on the command line or in a YAML file.

The keys of the option `env/<other>` come first at `env.<name>`, before every other file and override, so each
of these may change them. Hydra has no hook for a default that a value asks for, so its step from the list of
defaults to the configuration is wrapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from gymexp.cli.catalogue_source import explain_unknown
from gymexp.errors import ConfigError

_overrides: list[str] = []  # those of the configuration that Hydra composes now


def register() -> None:
    """Makes Hydra begin each variant with the keys of the environment that it names."""
    if hasattr(ConfigLoaderImpl, "gymexp_variants"):
        return
    load = ConfigLoaderImpl._load_configuration_impl
    compose = ConfigLoaderImpl._compose_config_from_defaults_list

    def load_configuration(
        self: Any, config_name: str | None, overrides: list[str], *a: Any, **k: Any
    ) -> Any:
        global _overrides
        before, _overrides = _overrides, list(overrides)
        try:
            return load(self, config_name, overrides, *a, **k)
        except MissingConfigException as error:
            group, _, name = (error.missing_cfg_file or "").partition("/")
            if group == "env" and (like := _named_in(overrides).get(name)):
                raise ConfigError(_listed(name, like)) from None
            raise
        finally:
            _overrides = before

    def compose_config(self: Any, defaults: list[ResultDefault], repo: Any) -> Any:
        named = _named_in_files(self, defaults, repo) | _named_in(_overrides)
        bases = [base for name, like in named.items() for base in _bases(self, repo, name, like, defaults)]
        place = next((i for i, default in enumerate(defaults) if default.primary), -1) + 1
        return compose(self, [*defaults[:place], *bases, *defaults[place:]], repo)

    ConfigLoaderImpl._load_configuration_impl = load_configuration
    ConfigLoaderImpl._compose_config_from_defaults_list = compose_config
    ConfigLoaderImpl.gymexp_variants = True  # pyright: ignore[reportAttributeAccessIssue]


def _named_in_files(loader: Any, defaults: list[ResultDefault], repo: Any) -> dict[str, str]:
    """Returns the environment that each variant names in the files of the list of defaults."""
    named: dict[str, str] = {}
    for default in defaults:
        if default.config_path is None or default.config_path.startswith(("hydra/", "schema")):
            continue
        config = loader._load_single_config(default=default, repo=repo).config
        here = dict(_likes(OmegaConf.to_container(config, resolve=False)))
        named |= here
        for name in here:
            own = f"env/{name}"
            if default.config_path != own and any(other.config_path == own for other in defaults):
                raise ConfigError(_chosen(name, here[name]))
    return named


def _named_in(overrides: list[str]) -> dict[str, str]:
    """Returns the environment that each variant names in the overrides."""
    named: dict[str, str] = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group.split(".")
        if key[0] != "env" or len(key) not in (2, 3) or override.is_delete() or override.is_sweep_override():
            continue
        value = override.value()
        named |= dict(_likes({"env": {key[1]: {key[2]: value} if len(key) == 3 else value}}))
    return named


def _likes(config: Any) -> Iterator[tuple[str, str]]:
    envs = config.get("env") if isinstance(config, Mapping) else None
    for name, env in (envs if isinstance(envs, Mapping) else {}).items():
        if isinstance(env, Mapping) and env.get("like") is not None:
            yield str(name), str(env["like"])


def _bases(
    loader: Any, repo: Any, name: str, like: str, defaults: list[ResultDefault]
) -> list[ResultDefault]:
    """Returns the options with which `env.<name>` begins, the first one first."""
    chain = [name]
    bases: list[ResultDefault] = []
    while True:
        key = f"env.{chain[-1]}.like={like}"
        if like in chain:
            circle = " is like ".join([*chain[chain.index(like) :], like])
            raise ConfigError(f"{key} must name another environment: {circle}")
        if not repo.config_exists(f"env/{like}"):
            if like in _named_in(_overrides):
                raise ConfigError(
                    f"{key} must name a file of env/ or an environment of NeMo Gym's, and {like} is a "
                    f"variant: say like={_named_in(_overrides)[like]}"
                )
            raise ConfigError(f"{key}: {explain_unknown(like)}")
        base = ResultDefault(config_path=f"env/{like}", parent="env", package=f"env.{name}")
        if repo.load_config(base.config_path).defaults_list:
            raise ConfigError(f"{key} must name a file without a defaults list: name what that list names")
        bases.insert(0, base)
        chain.append(like)
        found = loader._load_single_config(default=base, repo=repo).config
        following = dict(_likes(OmegaConf.to_container(found, resolve=False))).get(name)
        if following is None:
            break
        like = following
    own = f"env/{name}"
    if name in _named_in(_overrides) and any(default.config_path == own for default in defaults):
        raise ConfigError(_chosen(name, chain[1]))
    return bases


def _listed(name: str, like: str) -> str:
    return (
        f"env=[…,{name}] must leave {name} out: env.{name}.like={like} plays it beside those of the list. A "
        f"sweep that plays it in some jobs needs a file env/{name}.yaml in --config-dir, with like: {like}"
    )


def _chosen(name: str, like: str) -> str:
    return (
        f"env.{name}.like={like} must be of a name that env=[…] leaves out, and {name} is chosen by it: "
        "choose another name"
    )
