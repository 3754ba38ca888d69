"""Makes a checked RunConfig from Hydra's composed config, from a run directory, or from another RunConfig."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gymexp.config.explain import explain_error
from gymexp.config.plain_yaml import check_plain_yaml
from gymexp.config.rules import problems_of
from gymexp.config.schema import (
    RunConfig,
    SearchConfig,
)
from gymexp.config.search_space import ends, flat
from gymexp.errors import ConfigError

log = logging.getLogger(__name__)


def load(cfg: DictConfig) -> RunConfig:
    """Returns a checked RunConfig from Hydra's composed config.

    Raises ConfigError with every broken rule in one message.
    """
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    for name in [n for n, env in plain.env.items() if OmegaConf.is_missing(env, "config_path")]:
        # An experiment may set keys of an environment that env=[…] leaves out.
        log.info("env.%s is not selected by env=[…]: its settings are not used", name)
        del plain.env[name]
    try:
        # Hydra's `+key=value` may have added unknown keys. Merging into the bare schema reports them.
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), plain))
    except OmegaConfBaseException as error:
        raise ConfigError(explain_error(error)) from None
    assert isinstance(config, RunConfig)
    problems = list(problems_of(config)) or list(problems_of_values(config))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Returns a copy of `config` with other values at some keys, e.g. `{"trainer.learning_rate": 1e-5}`.

    Raises ConfigError with every rule that the new configuration breaks.
    """
    cfg = OmegaConf.create(dataclasses.asdict(config))
    for key, value in values.items():
        OmegaConf.update(cfg, key, value)
    return load(cfg)


def to_yaml(config: RunConfig) -> str:
    """Returns the whole configuration as YAML, which `from_yaml` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def from_yaml(path: Path) -> RunConfig:
    """Returns the checked configuration that a run directory was made with. path: its config.yaml.

    Raises ConfigError also if it has anything but plain values: a run writes them, and a stranger's
    `${oc.env:…}` would read this machine's environment.
    """
    try:
        text = path.read_bytes()
        check_plain_yaml(text)
        cfg = OmegaConf.create(text.decode())
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} must be the config.yaml of a run: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{path} must be the config.yaml of a run, which has keys and values")
    if key := _interpolated("", OmegaConf.to_container(cfg, resolve=False)):
        raise ConfigError(f"{path} must have plain values, as a run writes them, but {key} has ${{…}}")
    return load(cfg)


def _interpolated(at: str, value: Any) -> str | None:
    """Returns the first key at or below `at` whose value is an interpolation; None if there is none."""
    if isinstance(value, str):
        return at if "${" in value else None
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (_interpolated(f"{at}.{name}".lstrip("."), item) for name, item in inner)
    return next(filter(None, found), None)


def resumed(path: Path, resume: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the configuration of the run to resume, with `resume` set.

    path: the run's config.yaml. overrides: those on the command line beside resume=…. Raises ConfigError for
    every override but trainer.max_steps.
    """
    config = from_yaml(path)
    for override in (override.lstrip("+") for override in overrides):
        key = override.partition("=")[0]
        if key == "trainer.max_steps":
            config = with_values(config, {key: OmegaConf.select(OmegaConf.from_dotlist([override]), key)})
        elif key != "resume":
            raise ConfigError(
                f"{key} must be left out with resume=…, as a run keeps its configuration; only "
                "trainer.max_steps may be set, to train it longer"
            )
    return dataclasses.replace(config, resume=resume)


def problems_of_values(config: RunConfig) -> Iterator[str]:
    """Yields a problem for each key of `search.params` that has a value which no run may have.

    Each key is checked alone: at both ends of its range, or with each of its choices.
    """
    plain = dataclasses.replace(config, search=SearchConfig())
    for key, space in flat(config.search.params).items():
        for value in ends(space):
            try:
                with_values(plain, {key: value})
            except ConfigError as error:
                yield f"search.params.{key}: {error}"
                break
