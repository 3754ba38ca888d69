"""Imports point down, entries start without torch, and every module says by its name what it is about."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "gymexp").rglob("*.py"))
}
HEAVY = {"torch", "transformers", "trl", "vllm", "datasets", "wandb"}
SAYS_NOTHING = {"utils", "util", "common", "helpers", "misc", "base", "manager", "core"}


def read_layers() -> dict[str, int]:
    """Each folder, and each module outside of one -> its floor, from the top."""
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Layers")[1]
    names = [line.split()[0] for line in section.split("```")[1].strip().splitlines()]
    assert len(names) == len(set(names)), "each is named once"
    return {
        name.removesuffix(".py").rstrip("/"): number for number, name in enumerate([*names, "__init__.py"])
    }


LAYERS = read_layers()


def imports(path: Path, module_level_only: bool = False) -> set[str]:
    """The modules that a file imports; those for types alone are left out."""
    found: set[str] = set()
    open_: list[ast.AST] = [ast.parse(path.read_text())]
    while open_:
        node = open_.pop()
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative imports hide what they point at"
            full = [f"{node.module}.{name.name}" for name in node.names]
            found.update(name if name in MODULES else node.module for name in full)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif not (module_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            open_ += ast.iter_child_nodes(node)
    return found


def room_of(module: str) -> str:
    """A module's folder, or the module itself where it is in none."""
    return [*module.split("."), "__init__"][1]


def test_the_list_of_layers_names_every_folder_and_nothing_else():
    assert LAYERS.keys() == {room_of(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    """Within functions as well. So no two folders import each other, whatever way round."""
    below = [i for i in imports(MODULES[module]) if i in MODULES and room_of(i) != room_of(module)]
    above = [i for i in below if LAYERS[room_of(i)] <= LAYERS[room_of(module)]]
    assert not above, f"{module} imports from above: {', '.join(above)}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_uses_asyncios_wait_for(module):
    """Before Python 3.12 it drops a cancellation that comes as its awaitable ends, and a loop around it then
    goes on for ever, as two did. `asyncio.timeout` drops none."""
    nodes = ast.walk(ast.parse(MODULES[module].read_text()))
    called = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
    assert "asyncio.wait_for" not in called


def test_no_modules_import_each_other_within_functions_either():
    graph = {name: imports(path) & MODULES.keys() for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, [*way, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def named(path: Path) -> set[str]:
    """The modules of gymexp whose dotted name a file has as a text, as for import_module or `python -m`."""
    texts = (n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant))
    return {text for text in texts if isinstance(text, str) and text in MODULES and "." in text}


def test_no_module_is_imported_by_its_name():
    """`python -m` starts a process, and points wherever it has to; an import by name would hide an arrow."""
    for module, path in MODULES.items():
        loads = "import_module" in path.read_text() or "__import__" in path.read_text()
        assert not (loads and named(path)), f"{module} imports {named(path)} by name"


def loaded_by(module: str) -> dict[str, str]:
    """What importing a module imports, also by way of gymexp: outer module -> the one that imports it."""
    found, open_ = {}, [module]
    seen = set(open_)
    while open_:
        name = open_.pop()
        for other in imports(MODULES[name], module_level_only=True):
            if other in MODULES and other not in seen:
                seen.add(other)
                open_.append(other)
            elif other not in MODULES:
                found.setdefault(other.split(".")[0], name)
    return found


@pytest.mark.parametrize(
    "module",
    [
        "gymexp.train",
        "gymexp.evaluate",
        "gymexp.run.evaluate",
        "gymexp.prepare",
        "gymexp.coldstart.__main__",
        "gymexp.config.schema",
        "gymexp.run.controller",
        "gymexp.training.arguments",
        "gymexp.gateway.server",
    ],
)
def test_what_starts_a_run_imports_no_heavy_library(module):
    found = loaded_by(module)
    assert not HEAVY & found.keys(), {name: found[name] for name in HEAVY & found.keys()}


def test_the_heavy_imports_are_seen_where_they_are():
    assert "torch" in loaded_by("gymexp.training.trainer")
    assert loaded_by("gymexp.training.callbacks")["transformers"] == "gymexp.training.callbacks"


def test_the_gym_host_imports_nothing_of_gymexp():
    """It runs in NeMo Gym's Python, where gymexp is not installed."""
    assert not [name for name in imports(MODULES["gymexp.gym.host"]) if name.startswith("gymexp")]


@pytest.mark.parametrize("module", MODULES)
def test_a_modules_name_says_what_it_is_about_and_it_is_short(module):
    assert module.rpartition(".")[2] not in SAYS_NOTHING
    assert len(MODULES[module].read_text().splitlines()) < 400


def public(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """A module's own functions and classes that other modules may use."""
    for node in ast.parse(path.read_text()).body:
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("module", [name for name in MODULES if ".workplace.tasks." not in name])
def test_every_public_name_has_a_docstring(module):
    """`main` has its module's. Templates of workplace tasks are sentences themselves."""
    path = MODULES[module]
    assert ast.get_docstring(ast.parse(path.read_text())) or not path.read_text().strip()
    bare = [node.name for node in public(path) if node.name != "main" and not ast.get_docstring(node)]
    assert not bare, f"{module}: {', '.join(bare)}"


def identifiers(path: Path) -> Iterator[str]:
    """Every name in a file's code: defined, imported, or used. Of a text only what stands behind a dot, as in
    the path of a class that vLLM imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\.(\w+)", node.value)
        for field in ("id", "attr", "name", "arg"):
            if isinstance(name := getattr(node, field, None), str):
                yield name.rpartition(".")[2]


def test_no_public_name_is_used_by_nobody():
    """Another line of the product or of a benchmark has it, or a decorator registers it."""
    files = [*MODULES.values(), *(ROOT / "benchmarks").glob("*.py")]
    words = Counter(name for path in files for name in identifiers(path))
    for module, path in MODULES.items():
        alone = [n.name for n in public(path) if not n.decorator_list and words[n.name] < 2]
        assert not alone, f"{module}: {', '.join(alone)}"


def test_no_function_is_longer_than_80_lines():
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{module}: {node.name}"
