"""Makes docs/reference.md, the reference of a run's configuration, from the schema.

python -m gymexp.cli.reference > docs/reference.md

The meaning of a field is the comment after it, or the comment lines above it, in its dataclass.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import MISSING, OmegaConf

from gymexp.config.evaluate_schema import EndpointConfig, EvaluateConfig, PlayConfig
from gymexp.config.group_options import CONF_DIR
from gymexp.config.schema import EnvConfig, RunConfig
from gymexp.training import argument_rules

_TITLE = """\
`python -m gymexp.cli.reference > docs/reference.md` makes this page from the schema. A test compares the two.

A key is set on the command line (`python -m gymexp.train engine.max_batch_size=32`) or in a YAML file that
the command reads (`--config-name`, `experiment=…`, `conf/machine/default.yaml`). The defaults on this page
are the schema's. An option of `conf/` may set another value; `python -m gymexp.train --cfg job` prints the
values that a run would get. A key whose default is `???` needs a value, which an option of its group sets:
`model=…` sets `model.path`, and `env=[…]` sets `env.<name>.agent`.
"""
_ENV = (
    "A key contains the name of its environment: `env.sudoku.weight=3`. `env=[…]` selects the environments."
)
_TRAINER = """\
`trainer.*` are the arguments of
[`trl.GRPOConfig`](https://huggingface.co/docs/trl/main/en/grpo_trainer#trl.GRPOConfig), under TRL's names. An
argument that is not set has TRL's default, except for those in the first table, which `conf/train.yaml` and
`conf/trainer/grpo.yaml` set ([why](results.md#why-the-defaults-are-what-they-are)). Another option of
`conf/trainer/` sets other values, and `model=tiny` sets its own learning rate.
"""
_EVALUATE = """\
An evaluation ([guide](guides/evaluate.md)) has the groups `model`, `env`, `dataset`, `engine`, `gym`,
`rollout` and `evaluation` of a run, and these keys. It refuses the keys of a run that have no effect on it.
"""
_FATES = """\
[`training/argument_rules.py`](../gymexp/training/argument_rules.py) lists what gymexp does with each
argument. A refused value ends the command before anything starts.
"""


def meanings(schema: type) -> dict[str, str]:
    """Returns the comment of each field of a dataclass, by field name, without those that have none."""
    source = textwrap.dedent(inspect.getsource(schema))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ").rstrip() for t in tokens if t.type == tokenize.COMMENT}
    (class_,) = ast.parse(source).body
    assert isinstance(class_, ast.ClassDef)
    comment_of = {}
    for node in class_.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.end_lineno or node.lineno
            beside = [comments.pop(line) for line in range(node.lineno, last + 1) if line in comments]
            if texts := [*_above(node.lineno, comments), *beside]:
                comment_of[node.target.id] = " ".join(texts)
    return comment_of


def _above(line: int, comments: dict[int, str]) -> list[str]:
    """Returns the comment lines that end right above a line, and removes them from `comments`."""
    first = line
    while first - 1 in comments:
        first -= 1
    return [comments.pop(number) for number in range(first, line)]


def sections(schema: type = RunConfig, at: str = "") -> Iterator[tuple[str, type]]:
    """Yields (prefix of its keys, dataclass) of each section in the schema's order. The run's comes first."""
    yield at, schema
    for field in dataclasses.fields(schema):
        if below := _below(schema, field):
            yield from sections(below, f"{at}{_shown(field.name, schema)}.")


def rows(schema: type, at: str) -> Iterator[tuple[str, str, str, str]]:
    """Yields (key, type, default, meaning) of each field that has no section of its own."""
    commented = meanings(schema)
    for field in dataclasses.fields(schema):
        if _below(schema, field) or (schema is RunConfig and field.name == "trainer"):
            continue
        key = f"{at}{field.name}"
        yield key, str(field.type), _default(field), commented.get(field.name, "")


def reference() -> str:
    """Returns the whole page as Markdown."""
    parts = ["# Every key\n", *map(_paragraph, _TITLE.split("\n\n"))]
    for at, schema in sections():
        parts.append(f"## `{at.rstrip('.')}`\n" if at else "## The run\n")
        parts.append(_paragraph(_prose(inspect.getdoc(schema) or "")))
        if at == "env.<name>.":
            parts.append(f"{_ENV}\n")
        parts.append(_table(("key", "type", "default", "meaning"), map(_row, rows(schema, at))))
    return "\n".join([*parts, *_trainer(), *_evaluate()])


def _below(schema: type, field: dataclasses.Field[Any]) -> type | None:
    """Returns the dataclass that a field contains; None if the field is a plain value."""
    factory = EnvConfig if schema is RunConfig and field.name == "env" else field.default_factory
    return factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None


def _shown(name: str, schema: type) -> str:
    return "env.<name>" if schema is RunConfig and name == "env" else name


def _default(field: dataclasses.Field[Any]) -> str:
    factory = field.default_factory
    value = factory() if factory is not dataclasses.MISSING else field.default
    return MISSING if value is dataclasses.MISSING else str(value)


def _row(row: tuple[str, str, str, str]) -> tuple[str, str, str, str]:
    key, kind, default, meaning = row
    return f"`{key}`", f"`{kind}`", f"`{default}`", _prose(meaning)


def _trainer() -> Iterator[str]:
    """Yields the parts of the section on `trainer.*`, whose schema is TRL's."""
    yield "## `trainer`\n"
    yield _paragraph(_TRAINER)
    yield _table(("key", "value"), ((f"`trainer.{k}`", f"`{v}`") for k, v in _trainer_of_conf().items()))
    yield _paragraph(_FATES)
    yield "**Carried**: TRL's trainer does what the argument says.\n"
    yield _paragraph(", ".join(f"`{name}`" for name in sorted(argument_rules.CARRIED)) + ".")
    yield "**Owned**: gymexp sets the argument; another key stands for it.\n"
    yield _table(("argument", "key to use"), ((f"`{k}`", _code(v)) for k, v in argument_rules.OWNED.items()))
    yield "**Refused**: the argument must keep its neutral value.\n"
    refusals = (
        (f"`{k}`", f"`{r.neutral[0]}`", _prose(r.why), _prose(r.instead))
        for k, r in argument_rules.REFUSED.items()
    )
    yield _table(("argument", "only value", "why", "instead"), refusals)
    yield "**Harmless**: nothing reads the argument.\n"
    yield _table(("argument", "why"), ((f"`{k}`", why) for k, why in argument_rules.HARMLESS.items()))


def _evaluate() -> Iterator[str]:
    """Yields the part on the keys that `gymexp.evaluate` has beside a run's."""
    yield "## Keys of `gymexp.evaluate` alone\n"
    yield _paragraph(_EVALUATE)
    own = [row for row in rows(EvaluateConfig, "") if row[0] not in ("env", "trainer")]
    of_play = [row for row in rows(PlayConfig, "evaluation.") if row[3]]
    yield _table(
        ("key", "type", "default", "meaning"), map(_row, [*own, *rows(EndpointConfig, "endpoint."), *of_play])
    )


def _trainer_of_conf() -> Mapping[str, Any]:
    """Returns the values of `trainer.*` that conf/ sets before any override."""
    values: dict[str, Any] = {}
    for file, at in (("train.yaml", "trainer"), ("trainer/grpo.yaml", "")):
        loaded: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / file), resolve=False)
        values |= loaded[at] if at else loaded
    return values


def _code(key: str) -> str:
    """Formats a key as Markdown code; other text stays as it is."""
    return f"`{key}`" if re.fullmatch(r"[\w.<>=]+", key) else key


def _prose(text: str) -> str:
    """Escapes plain text for Markdown: text outside of `code` makes neither tags nor italics."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([<*])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _paragraph(text: str) -> str:
    """Wraps text to the page's width and adds an empty line after it."""
    return textwrap.fill(" ".join(text.split()), 125, break_long_words=False, break_on_hyphens=False) + "\n"


def _table(head: tuple[str, ...], lines: Any) -> str:
    """Returns a Markdown table. A bar in a cell is escaped, so that it does not divide the cell."""
    cells = [head, tuple("---" for _ in head), *lines]
    text = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
