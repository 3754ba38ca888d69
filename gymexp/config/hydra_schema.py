"""The schema as Hydra gets it: closed, so that an unknown key is an error, except below a few open keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from gymexp.config.schema import DataConfig, EnvConfig, RunConfig


def _open() -> Any:
    return OmegaConf.create({}, flags={"struct": False})


@dataclass
class _OpenData(DataConfig):
    options: dict[str, Any] = field(default_factory=_open)


@dataclass
class _OpenEnv(EnvConfig):
    servers: dict[str, Any] = field(default_factory=_open)
    data: DataConfig = field(default_factory=_OpenData)


@dataclass
class _OpenRun(RunConfig):
    env: dict[str, _OpenEnv] = field(default_factory=dict)  # pyright: ignore[reportIncompatibleVariableOverride]


def register() -> None:
    """Registers the schema with Hydra, under the name that `conf/train.yaml` lists first.

    Keys that belong to other programs are open and need no `+` on the command line: TRL's arguments
    (`gymexp.training.arguments` checks them), flags of `vllm serve`, variables of the chat template, options
    of a generator, keys of NeMo Gym's servers, the keys that a search varies, and the steps of a schedule.
    """
    node = OmegaConf.structured(_OpenRun)
    open_keys = (node.trainer, node.engine.args, node.model.chat_template_kwargs, node.search.params)
    for open_ in (*open_keys, node.dataset.schedule):
        OmegaConf.set_struct(open_, False)
    ConfigStore.instance().store(name="schema", node=node)
