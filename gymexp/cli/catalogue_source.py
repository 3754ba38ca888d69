"""NeMo Gym's environments as options of the group `env`.

A file `env/<name>.yaml` in conf/, in --config-dir or in hydra.searchpath comes first. For any other name
Hydra asks the catalogue of the NeMo Gym that the run would use: that of `gym.*` in the same configuration.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from gymexp.config.group_options import options
from gymexp.config.schema import GymConfig
from gymexp.gym.catalogue import Entry, kept_catalogue, load_catalogue, options_of
from gymexp.printable import say_progress
from gymexp.record.places import cache_dir

_ENV = "env/"
# Returns `gym.*` of the configuration that Hydra composes; None while that is being composed without `env`.
_gym: Callable[[], GymConfig] | None = GymConfig
_catalogues: dict[str, dict[str, Entry]] = {}  # those that this process has read


class CatalogueSource(ConfigSource):
    """The last place where Hydra looks for an option of `env`."""

    @staticmethod
    def scheme() -> str:
        return "nemo-gym"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path == "env"

    def is_config(self, config_path: str) -> bool:
        name = config_path.removeprefix(_ENV)
        if not config_path.startswith(_ENV) or not re.fullmatch(r"[a-z0-9_]+", name):
            return False  # no name of the catalogue's
        return _gym is None or name in _catalogue(_gym(), name)

    def load_config(self, config_path: str) -> ConfigResult:
        name = config_path.removeprefix(_ENV)
        values = options_of(_catalogue(_gym(), name)[name]) if _gym else {}
        header: dict[str, str | None] = {"package": f"env.{name}" if _gym else None}
        return ConfigResult(self.provider, f"{self.scheme()}://{name}", OmegaConf.create(values), header)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path != "env" or results_filter == ObjectType.GROUP or _gym is None:
            return []
        return list(kept_catalogue(_gym(), cache_dir()))  # as in completion, which must not install anything


def register() -> None:
    """Makes Hydra look for options of `env` in the catalogue, after all folders. Hydra has no hook for a
    source that comes after those of hydra.searchpath."""
    if CatalogueSource.scheme() in SourcesRegistry.instance().types:
        return
    SourcesRegistry.instance().register(CatalogueSource)
    initialize, load = ConfigRepository.initialize_sources, ConfigLoaderImpl._load_configuration_impl

    def initialize_sources(self: Any, config_search_path: Any) -> None:
        initialize(self, config_search_path)
        source = CatalogueSource("NeMo Gym", f"{CatalogueSource.scheme()}://")
        self.sources.insert(len(self.sources) - 1, source)  # the schema must be the last one

    def load_configuration(
        self: Any, config_name: str | None, overrides: list[str], *a: Any, **k: Any
    ) -> Any:
        global _gym

        def gym() -> GymConfig:
            global _gym
            before, _gym = _gym, None
            try:
                others = [o for o in overrides if not _selects_environments(o)]
                return _gym_of(load(self, config_name, others, *a, **k))
            finally:
                _gym = before

        if _gym is None:
            return load(self, config_name, overrides, *a, **k)
        before, _gym = _gym, _once(gym)
        try:
            return load(self, config_name, overrides, *a, **k)
        finally:
            _gym = before

    ConfigRepository.initialize_sources = initialize_sources
    ConfigLoaderImpl._load_configuration_impl = load_configuration


def explain_unknown(name: str, catalogue: Iterable[str] = ()) -> str:
    """Returns the error message for `env=[name]` if no folder and no catalogue has the name. catalogue: names
    of a catalogue beside those that Hydra has asked."""
    known = [*options("env"), *catalogue, *(n for read in _catalogues.values() for n in read)]
    close = difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.6)
    close += [n for n in known if name in n and n not in close][:3]
    near = f"; did you mean {' or '.join(f'env={n}' for n in close)}?" if close else ""
    return (
        f"env={name} is not known{near}. Known: {', '.join(options('env'))}, and NeMo Gym's environments: "
        "python -m gymexp.envs --search TEXT"
    )


def _catalogue(gym: GymConfig, name: str) -> dict[str, Entry]:
    """Returns the catalogue to look for `name` in. It is not made for what looks like a misspelled name of a
    file of conf/env/, as that may take half a minute and a network."""
    key = repr(gym)
    if key not in _catalogues:
        is_mistake = difflib.get_close_matches(name, options("env"), n=1, cutoff=0.7)
        if is_mistake and not (kept := kept_catalogue(gym, cache_dir())):
            return kept
        _catalogues[key] = load_catalogue(gym, cache_dir(), say_progress)
    return _catalogues[key]


def _once(make: Callable[[], GymConfig]) -> Callable[[], GymConfig]:
    made: list[GymConfig] = []

    def get() -> GymConfig:
        if not made:
            made.append(make())
        return made[0]

    return get


def _selects_environments(override: str) -> bool:
    [parsed] = OverridesParser.create().parse_overrides([override])
    return parsed.key_or_group.split(".")[0].split("@")[0] == "env"


def _gym_of(cfg: Any) -> GymConfig:
    values = OmegaConf.to_container(cfg.gym, resolve=True) if "gym" in cfg else {}
    assert isinstance(values, dict)
    return GymConfig(**{str(key): value for key, value in values.items()})
