"""The schema as Hydra gets it: which keys are open on the command line, and what was meant by one that is not
there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from gymexp.config import DataConfig, EnvConfig, RunConfig, options
from gymexp.names import meant, nearest


def _open() -> Any:
    return OmegaConf.create({}, flags={"struct": False})


@dataclass
class _OpenData(DataConfig):
    options: dict[str, Any] = field(default_factory=_open)


@dataclass
class _OpenEnv(EnvConfig):
    data: DataConfig = field(default_factory=_OpenData)


@dataclass
class _OpenRun(RunConfig):
    env: dict[str, _OpenEnv] = field(default_factory=dict)  # pyright: ignore[reportIncompatibleVariableOverride]


def register() -> None:
    """Make the schema known to Hydra, under the name that `conf/train.yaml` puts first.

    What others' programs take is open, and needs no `+` on the command line: TRL's arguments
    (`gymexp.training.arguments` checks them), flags of `vllm serve`, variables of the chat template, options
    of a generator.
    """
    node = OmegaConf.structured(_OpenRun)
    for open_ in (node.trainer, node.engine.args, node.model.chat_template_kwargs, node.search.params):
        OmegaConf.set_struct(open_, False)
    ConfigStore.instance().store(name="schema", node=node)


def explain_key(
    key: str, schema: type = RunConfig, missing: str | None = None, more: Sequence[str] = ()
) -> str | None:
    """What is wrong with the key of an override, e.g. `env.sudoku.wieght`; None if it is a key of the
    schema. missing: how much of it is not there, as OmegaConf says. more: keys that may be meant."""
    place: Any = schema
    done: list[str] = []
    for name in key.split("."):
        if not dataclasses.is_dataclass(place):
            done.append(name)
            place = EnvConfig if done == ["env", name] else Any
            continue
        fields = {f.name: f for f in dataclasses.fields(place)}
        prefix = "".join(f"{d}." for d in done)
        if name not in fields:
            near = meant(name, list(fields), prefix, [*keys(schema), *more])
            return f"{key} is not a known key{near}. Known keys here: {', '.join(fields)}"
        done.append(name)
        factory = fields[name].default_factory
        place = factory if dataclasses.is_dataclass(factory) else Any
    if done[0] == "env" and len(done) > 2 and missing in (None, f"env.{done[1]}"):
        near = "" if done[1] in options("env") else nearest(done[1], options("env"), "env.")
        return f"{key}: env.{done[1]} is not among the selected environments: add it to env=[…]{near}"
    return None


def keys(schema: type = RunConfig, at: str = "") -> list[str]:
    """Every key of the schema, `env.<name>.weight` for those of an environment."""
    found = []
    for field_ in dataclasses.fields(schema):
        below = EnvConfig if field_.name == "env" else field_.default_factory
        key = f"{at}{field_.name}" + (".<name>" if field_.name == "env" else "")
        found += keys(below, f"{key}.") if dataclasses.is_dataclass(below) else [key]
    return found
