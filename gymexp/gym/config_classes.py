"""What the code of a NeMo Gym server says about its configuration: the fields that may not be null.

The code is read and not run: its requirements may not be installed yet, and some servers download data when
they are imported. Only what is certain counts. A class of which a part cannot be found, or that changes its
input before pydantic checks it, demands nothing here; NeMo Gym then refuses a null when the server starts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gymexp.record.places import OWN_SERVERS

_PLAIN = {"str", "int", "float", "bool", "bytes", "list", "dict", "tuple", "set", "frozenset", "Path"}
_PLAIN |= {"List", "Dict", "Tuple", "Set", "FrozenSet", "Sequence", "Mapping"}
_CHANGES_INPUT = ("before", "wrap", "plain")  # modes of pydantic's validators
_PACKAGES = ("nemo_gym", *OWN_SERVERS)  # not those of others, whose classes do as they like
_NO_FIELDS = ("BaseModel", "ABC")  # bases without any
_GIVEN = ("host", "port", "name", "max_steps")  # by gymexp, which takes the last from env.<name>.max_steps


@dataclass(frozen=True)
class _Place:
    """A module: what its names mean, where it is, and the directories in which modules are looked for."""

    names: Mapping[str, ast.ClassDef | tuple[ast.ImportFrom, str]]  # a class, or what it is in another module
    file: Path
    roots: tuple[Path, ...]


@dataclass(frozen=True)
class _Class:
    node: ast.ClassDef
    place: _Place


@dataclass(frozen=True)
class _Field:
    annotation: ast.expr
    place: _Place  # of the class that has it
    has_default: bool


def nulls(values: Mapping[str, Any], module: str, roots: Sequence[Path]) -> Iterator[str]:
    """Yields the path of each key of a server's configuration that its class does not allow to be null.

    These are the keys that are needed although `values` do not have them, and all that `values` have. module:
    the server's, e.g. resources_servers.mcqa.app. roots: the directories in which modules are looked for, in
    this order.
    """
    place = _module(module, tuple(roots))
    server = place and _server(place)
    if server and (config := _config_of(server)):
        yield from _nulls(values, config, "")


def _nulls(values: Mapping[str, Any], config: _Class, at: str) -> Iterator[str]:
    for name, field in (_fields(config) or {}).items():
        if not at and name in _GIVEN:
            continue
        if (name in values or not field.has_default) and _never_null(field.annotation, field.place):
            yield f"{at}{name}"
        inner = _class_of(field.annotation, field.place)
        if inner and isinstance(values.get(name), Mapping):
            yield from _nulls(values[name], inner, f"{at}{name}.")


@cache
def _module(name: str, roots: tuple[Path, ...], folder: Path | None = None) -> _Place | None:
    """Returns a module of NeMo Gym's, or of `folder`, which comes first; None if it cannot be read."""
    path = name.replace(".", "/")
    places = [folder] if folder else []
    places += roots if name.partition(".")[0] in _PACKAGES else []
    files = (root / end for root in places for end in (f"{path}.py", f"{path}/__init__.py"))
    file = next((file for file in files if file.is_file()), None)
    try:
        body = ast.parse(file.read_bytes()).body if file else []
    except (OSError, SyntaxError, ValueError):
        return None
    names: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: (node, alias.name) for alias in node.names}
    return _Place(names, file, roots) if file else None


def _server(place: _Place) -> _Class | None:
    """Returns the server's class: as for host.py, the last one of the module that is a server."""
    classes = [node for node in place.names.values() if isinstance(node, ast.ClassDef)]
    servers = (_Class(node, place) for node in reversed(classes))
    return next((one for one in servers if "SimpleServer" in _ancestors(one)), None)


def _ancestors(one: _Class) -> set[str]:
    names = {one.node.name}
    for base in one.node.bases:
        found = _class_of(base, one.place)
        names |= _ancestors(found) if found else set()
    return names


def _config_of(server: _Class) -> _Class | None:
    """Returns the class of the server's `config`, its own or an inherited one."""
    own = [
        node
        for node in server.node.body
        if isinstance(node, ast.AnnAssign) and _name(node.target) == "config"
    ]
    if own:
        return _class_of(own[-1].annotation, server.place)
    bases = (_class_of(base, server.place) for base in server.node.bases)
    return next((config for base in bases if base and (config := _config_of(base))), None)


def _fields(config: _Class) -> dict[str, _Field] | None:
    """Returns the fields of a pydantic class that are checked as the file has them, with those of its bases;
    None if not all of it can be read."""
    fields: dict[str, _Field] = {}
    for base in reversed(config.node.bases):
        if _name(base) in _NO_FIELDS:
            continue
        found = _class_of(base, config.place)
        if found is None or (inherited := _fields(found)) is None:
            return None
        fields |= inherited
    for node in config.node.body:
        if isinstance(node, ast.AnnAssign) and (name := _name(node.target)):
            fields.pop(name, None)
            if not _is_renamed(node.value):
                fields[name] = _Field(node.annotation, config.place, _has_default(node.value))
        elif isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                changed = _changed(decorator)
                if changed is None:
                    return None
                for name in changed:
                    fields.pop(name, None)
    return fields


def _changed(decorator: ast.expr) -> list[str] | None:
    """Returns the fields that a validator may change before pydantic checks them; None: perhaps all."""
    if not isinstance(decorator, ast.Call):
        return None if _name(decorator) in ("root_validator", "validator") else []
    what = _name(decorator.func)
    if what not in ("field_validator", "model_validator", "validator", "root_validator"):
        return []
    mode = next(
        (k.value.value for k in decorator.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)),
        "",
    )
    if what in ("field_validator", "model_validator") and mode not in _CHANGES_INPUT:
        return []
    names = [arg.value for arg in decorator.args if isinstance(arg, ast.Constant)]
    return None if what != "field_validator" or "*" in names else [str(name) for name in names]


def _is_renamed(value: ast.expr | None) -> bool:
    """Returns whether a field has another name in the configuration's file."""
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return any(keyword.arg in (None, "alias", "validation_alias") for keyword in keywords)


def _has_default(value: ast.expr | None) -> bool:
    if value is None:
        return False
    if not isinstance(value, ast.Call) or _name(value.func) != "Field":
        return True
    if value.args:
        return not (isinstance(value.args[0], ast.Constant) and value.args[0].value is ...)
    return any(keyword.arg in ("default", "default_factory") for keyword in value.keywords)


def _never_null(annotation: ast.expr, place: _Place) -> bool:
    """Returns whether a type has no null for certain."""
    match annotation:
        case ast.Constant(value=str(text)):
            return _never_null(ast.parse(text, mode="eval").body, place)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _never_null(left, place) and _never_null(right, place)
        case ast.Subscript(value=outer, slice=inner):
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            if _name(outer) == "Union":
                return all(_never_null(part, place) for part in parts)
            if _name(outer) == "Literal":
                return all(isinstance(part, ast.Constant) and part.value is not None for part in parts)
            return _name(outer) in _PLAIN
        case ast.Name() | ast.Attribute():
            found = _class_of(annotation, place)
            if found is None:
                return _name(annotation) in _PLAIN
            return _is_enum(found) or _fields(found) is not None
    return False


def _is_enum(one: _Class) -> bool:
    """Returns whether a class is an enumeration that makes no member of a null."""
    methods = [node.name for node in one.node.body if isinstance(node, ast.FunctionDef)]
    return "_missing_" not in methods and any(_name(base).endswith("Enum") for base in one.node.bases)


def _class_of(expression: ast.expr, place: _Place, depth: int = 8) -> _Class | None:
    """Returns the class that a name of a module means, followed through imports; None if it is not found."""
    if isinstance(expression, ast.Subscript):  # Server[Task] is a Server
        expression = expression.value
    found = place.names.get(_name(expression))
    if isinstance(found, ast.ClassDef):
        return _Class(found, place)
    if found is None or not depth:
        return None
    node, name = found
    other = _imported(node, place)
    return other and _class_of(ast.Name(name), other, depth - 1)


def _imported(node: ast.ImportFrom, place: _Place) -> _Place | None:
    """Returns the module of `from … import`, as the server imports it: its own folder comes first."""
    folder = place.file.parents[max(node.level - 1, 0)]
    return _module(node.module or "__init__", place.roots, folder)


def _name(expression: ast.expr) -> str:
    """Returns the last part of a name, as `Field` of `pydantic.Field`; "" if the expression is no name."""
    if isinstance(expression, ast.Attribute):
        return expression.attr
    return expression.id if isinstance(expression, ast.Name) else ""
