"""The arguments of trl.GRPOConfig and their defaults, read from TRL's source, so that TRL is not imported."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

# A class stands before the one that it inherits from, so the first default found is the one that counts.
_SOURCES = (
    ("trl", "trainer/grpo_config.py", "GRPOConfig"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("transformers", "training_args.py", "TrainingArguments"),
)


def names() -> frozenset[str]:
    """Every argument that GRPOConfig takes."""
    return frozenset(_default_nodes())


def value_of(trainer: Mapping[str, Any], name: str) -> Any:
    """The value of `trainer.<name>`, or GRPOConfig's default where the configuration leaves it out.

    Raises KeyError for a name that GRPOConfig does not have, ValueError for one whose default is computed.
    """
    return trainer[name] if name in trainer else default(name)


@cache
def default(name: str) -> Any:
    """GRPOConfig's default of an argument. Raises KeyError and ValueError as `value_of` does."""
    node = _default_nodes()[name]
    if isinstance(node, ast.Call):  # field(default=…, metadata=…)
        node = next((keyword.value for keyword in node.keywords if keyword.arg == "default"), None)
    try:
        return ast.literal_eval(node)  # pyright: ignore[reportArgumentType]
    except ValueError:
        raise ValueError(f"the default of {name} is not a literal in GRPOConfig's source") from None


def read_source(package: str, file: str) -> ast.Module:
    """The syntax tree of a package's file, without importing the package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text())


@cache
def _default_nodes() -> dict[str, ast.expr | None]:
    found: dict[str, ast.expr | None] = {}
    for package, file, cls in _SOURCES:
        tree = read_source(package, file)
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls)
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.setdefault(node.target.id, node.value)
    return {name: node for name, node in found.items() if not name.startswith("_")}
