"""Error messages for a key or a value that the schema does not have, with the nearest key that it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from gymexp.config.group_options import options
from gymexp.config.schema import EnvConfig, RunConfig
from gymexp.config.suggestions import nearest, suggestion


def explain_error(error: OmegaConfBaseException) -> str:
    """Returns the text of a ConfigError for a value that OmegaConf refuses for a key of the schema."""
    key = error.full_key or ""
    text = str(error).splitlines()[0]
    if "Missing mandatory value" in text:
        return f"{key} has no value: say {key}=…"
    if (
        error.parent_node is None
        or error.object_type is None
        or not dataclasses.is_dataclass(error.object_type)
    ):
        return f"{key}: {text}" if key else text
    known = [f.name for f in dataclasses.fields(error.object_type)]
    name = key.rsplit(".", 1)[-1]
    if name in known:
        return f"{key}: {text}"
    prefix = key.removesuffix(name)
    return f"{key} is not a known key{suggestion(name, known, prefix)}. Known keys: {', '.join(known)}"


def explain_key(
    key: str, schema: type = RunConfig, missing: str | None = None, more: Sequence[str] = ()
) -> str | None:
    """Returns the error message for the key of an override, e.g. `env.sudoku.wieght`; None for a known key.

    missing: the part of the key that OmegaConf did not find. more: keys beyond the schema's to suggest.
    """
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
            near = suggestion(name, list(fields), prefix, [*keys(schema), *more])
            return f"{key} is not a known key{near}. Known keys: {', '.join(fields)}"
        done.append(name)
        factory = fields[name].default_factory
        place = factory if dataclasses.is_dataclass(factory) else Any
    if done[0] == "env" and len(done) > 2 and missing in (None, f"env.{done[1]}"):
        near = "" if done[1] in options("env") else nearest(done[1], options("env"), "env.")
        return f"{key}: env.{done[1]} is not among the selected environments: add it to env=[…]{near}"
    return None


def keys(schema: type = RunConfig, at: str = "") -> list[str]:
    """Returns every key of the schema. An environment's keys are `env.<name>.weight` and so on."""
    names = []
    for field_ in dataclasses.fields(schema):
        below = EnvConfig if field_.name == "env" else field_.default_factory
        key = f"{at}{field_.name}" + (".<name>" if field_.name == "env" else "")
        names += keys(below, f"{key}.") if dataclasses.is_dataclass(below) else [key]
    return names
