"""A checked RunConfig: from what Hydra composed, from a run directory, or with other values."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gymexp.config.explain import explain_error
from gymexp.config.rules import problems_of
from gymexp.config.schema import (
    RunConfig,
    SearchConfig,
)
from gymexp.config.space import ends, flat
from gymexp.errors import ConfigError

log = logging.getLogger(__name__)


def load(cfg: DictConfig) -> RunConfig:
    """A checked RunConfig from Hydra's composed config. Raises ConfigError with every broken rule in one
    message."""
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    for name in [n for n, env in plain.env.items() if OmegaConf.is_missing(env, "config_path")]:
        # an experiment may set keys of an environment that env=[…] leaves out
        log.info("env.%s is not selected by env=[…]: its settings are not used", name)
        del plain.env[name]
    try:
        # Hydra's `+key=value` may have added what the schema does not know: merge into the bare schema to see
        # it.
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), plain))
    except OmegaConfBaseException as error:
        raise ConfigError(explain_error(error)) from None
    assert isinstance(config, RunConfig)
    problems = list(problems_of(config)) or list(problems_of_values(config))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The same configuration with other values at some keys, e.g. `{"trainer.learning_rate": 1e-5}`. Raises
    ConfigError as `load` does."""
    cfg = OmegaConf.create(dataclasses.asdict(config))
    for key, value in values.items():
        OmegaConf.update(cfg, key, value)
    return load(cfg)


def to_yaml(config: RunConfig) -> str:
    """The whole configuration, as `from_yaml` reads it."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def from_yaml(path: Path) -> RunConfig:
    """The config a run directory was made with."""
    cfg = OmegaConf.load(path)
    assert isinstance(cfg, DictConfig)
    return load(cfg)


def resumed(path: Path, resume: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of the run to go on with, marked as resumed. overrides: what was said with resume=…, which
    may be how far to train. Raises ConfigError."""
    config = from_yaml(path)
    for override in (override.lstrip("+") for override in overrides):
        key = override.partition("=")[0]
        if key == "trainer.max_steps":
            config = with_values(config, {key: OmegaConf.select(OmegaConf.from_dotlist([override]), key)})
        elif key != "resume":
            raise ConfigError(
                f"{key} must be left out with resume=…, as a run keeps its configuration; trainer.max_steps "
                "alone may be said, to train it longer"
            )
    return dataclasses.replace(config, resume=resume)


def problems_of_values(config: RunConfig) -> Iterator[str]:
    """What a search may try and no run may have: each key's values, one after the other."""
    plain = dataclasses.replace(config, search=SearchConfig())
    for key, space in flat(config.search.params).items():
        for value in ends(space):
            try:
                with_values(plain, {key: value})
            except ConfigError as error:
                yield f"search.params.{key}: {error}"
                break
