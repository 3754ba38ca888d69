"""Shows which small faults the fast tests miss in the modules that decide training.

    python benchmarks/mutants.py                          17 mutants of each module in MODULES
    python benchmarks/mutants.py rollout/tokens --num 50 --seed 3

A mutant is a module with one change. The module's tests run in a copy of the repository. A mutant that they
do not notice has survived, and is printed as a diff. Three kinds of mutants are left out: those of code
without effect on results (error texts, logging, annotations), those of `main` functions, which only whole
runs start, and those in `mutants_equivalent.toml`, which change nothing for the reason given in that file.

This is our own code, because cosmic-ray 8.7 and mutmut 3.8 neither drop statements and keywords nor draw a
sample, and start Python anew for each mutant. This script forks a process that has imported torch.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EQUIVALENT = Path(__file__).with_suffix("").with_name("mutants_equivalent.toml")
MODULES = {  # the tests of each module, slow ones last, as the first failure ends the run of a mutant
    "rollout/tokens": "rollout/test_tokens.py gateway/test_history.py",
    "gateway/history": "gateway/test_history.py",
    "gateway/server": "gateway/test_server.py gateway/test_history.py rollout/test_draws.py",
    "gateway/chat": "gateway/test_chat.py gateway/test_server.py",
    "gateway/pieces": "gateway/test_pieces.py",
    "gateway/engines": "gateway/test_updates.py gateway/test_server.py",
    "gateway/spread": "gateway/test_spread.py",
    "gateway/load": "gateway/test_load.py",
    "engine/weight_sync": "engine/test_weight_sync.py",
    "engine/weight_transfer": "engine/test_weight_transfer.py engine/test_weight_sync.py",
    "engine/adapter_transfer": "engine/test_adapter_transfer.py engine/test_weight_sync.py",
    "engine/admission": "engine/test_weight_sync.py gateway/test_updates.py",
    "engine/engine_load": "gateway/test_load.py",
    "training/rollout_func": "training/test_rollout_func.py",
    "training/padding": "training/test_padding.py training/test_objective.py",
    "training/callbacks": "training/test_callbacks.py",
    "training/packing": "training/test_packing.py",
    "training/kept_layers": "training/test_kept_layers.py",
    "training/recomputed_layers": "training/test_recomputed_layers.py",
    "training/drift": "training/test_drift.py training/test_trainer.py",
    "training/queued_tasks": "training/test_queued_tasks.py",
    "training/drawn_tasks": "training/test_drawn_tasks.py training/test_queued_tasks.py",
    "training/batches": "training/test_batches.py training/test_objective.py",
    "training/trained_values": "training/test_trained_values.py training/test_rollout_func.py",
    "training/named_weights": "training/test_named_weights.py training/test_engine_client.py",
    "rollout/attempts": "rollout/test_attempts.py rollout/test_collect.py",
    "rollout/batch": "rollout/test_batch.py",
    "rollout/collect": "rollout/test_collect.py",
    "rollout/play": "rollout/test_play.py rollout/test_collect.py",
    "rollout/group_queue": "rollout/test_group_queue.py",
    "rollout/group_schedule": "rollout/test_group_schedule.py",
    "rollout/packed": "rollout/test_packed.py",
    "rollout/landing": "rollout/test_landing.py",
    "rollout/draws": "rollout/test_draws.py gateway/test_pieces.py",
    "data/curriculum": "data/test_curriculum.py",
    "sweep/watch": "sweep/test_watch.py",
    "sweep/job": "sweep/test_job.py sweep/test_job_lead.py",
    "record/optuna_study": "record/test_study_rules.py record/test_optuna_study.py",
    "cluster/slurm_states": "cluster/test_slurm_states.py sweep/test_watch.py",
    "cluster/slurm_job": "cluster/test_slurm_job.py",
}
SLOW = "gym or e2e or ranks or vllm or ray or gpu or slurm"
PRELOADED = (
    "torch",
    "transformers",
    "datasets",
    "trl.trainer.grpo_trainer",
    "aiohttp",
    "hypothesis",
    "pytest",
)
NO_EFFECT = {"log", "logging", "warnings"}
OTHER = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div,
    ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.RShift: ast.LShift,
}  # fmt: skip


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes that may replace the node in a mutant."""
    match node:
        case ast.Compare(left, [op], [right]):
            yield ast.Compare(left, [OTHER[type(op)]()], [right])
            if isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE):
                yield ast.UnaryOp(ast.Not(), node)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(OTHER[type(op)](), values)
        case ast.BinOp(left, op, right) if type(op) in OTHER:
            yield ast.BinOp(left, OTHER[type(op)](), right)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool() | None as value):
            yield ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.Constant(str() as value):
            yield ast.Constant(value + "x" if value else "x")
            yield ast.Constant("") if value else ast.Constant("y")
        case ast.If(test, body, orelse) | ast.IfExp(test, body, orelse):
            yield type(node)(ast.UnaryOp(ast.Not(), test), body, orelse)  # type: ignore[arg-type]
        case ast.While(test, body, orelse) if not isinstance(test, ast.Constant):
            yield ast.While(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Return(ast.expr() as value) if not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(ast.Call() | ast.Await()) | ast.Raise():
            yield ast.Pass()
        case ast.Assign([ast.Attribute() | ast.Subscript()]) | ast.AugAssign():
            yield ast.Pass()
        case ast.Call(func, args, keywords) if keywords:
            for keyword in keywords:
                yield ast.Call(func, args, [other for other in keywords if other is not keyword])


def has_no_effect(node: ast.AST) -> bool:
    """Returns whether mutants leave out the node and all nodes below it."""
    match node:
        case ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.Raise() | ast.Assert():
            return True
        case ast.Expr(ast.Constant()) | ast.FunctionDef(name="main"):
            return True
        case ast.Assign(value=ast.Call(ast.Name("TypeVar"))):
            return True
        case ast.If(test):
            return ast.unparse(test) in ("TYPE_CHECKING", "__name__ == '__main__'")
        case ast.Call(ast.Attribute(ast.Name(name))) | ast.Expr(ast.Call(ast.Attribute(ast.Name(name)))):
            return name in NO_EFFECT
    return False


@dataclass
class Edit:
    """One change: `value` in place of a field of `node`, or of one entry of the list in that field."""

    node: ast.AST
    field: str
    index: int | None
    value: ast.AST

    def source(self, tree: ast.Module) -> str:
        """Returns the source of the whole module with the change. The tree itself keeps its old state."""
        old = getattr(self.node, self.field)
        new: Any = self.value
        if self.index is not None:
            new = [*old[: self.index], self.value, *old[self.index + 1 :]]
        setattr(self.node, self.field, new)
        try:
            return ast.unparse(ast.fix_missing_locations(tree))
        finally:
            setattr(self.node, self.field, old)


def edits(node: ast.AST) -> Iterator[Edit]:
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params", "ctx", "op", "ops"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST):
                continue
            if not (has_no_effect(child) and not isinstance(child, ast.Raise)):
                for new in replacements(child):
                    yield Edit(node, field, index if isinstance(value, list) else None, new)
            if not has_no_effect(child):
                yield from edits(child)


def changed_lines(diff: list[str]) -> tuple[list[str], list[str]]:
    return tuple([line[1:].strip() for line in diff[2:] if line[0] == sign] for sign in "-+")  # type: ignore[return-value]


def mutants_of(module: str) -> tuple[str, list[tuple[str, list[str]]]]:
    """Returns the unchanged source, and the mutants as (source, diff), without the equivalent ones."""
    tree = ast.parse((ROOT / "gymexp" / f"{module}.py").read_text())
    original = ast.unparse(tree)
    equivalent = [
        (entry["old"], entry["new"])
        for entry in tomllib.loads(EQUIVALENT.read_text())["mutants"]
        if entry["module"] == module
    ]
    mutants = {}
    for edit in edits(tree):
        source = edit.source(tree)
        diff = list(difflib.unified_diff(original.splitlines(), source.splitlines(), "", "", "", "", 1, ""))
        old, new = (" ".join(lines) for lines in changed_lines(diff))
        if source != original and (old, new) not in equivalent:
            mutants[source] = diff
    return original, list(mutants.items())


def run_tests(copy: Path, tests: str) -> None:
    """Runs the tests and exits with pytest's code. Call it in a child process: it starts a process group.

    The output goes to `output.txt` in `copy`.
    """
    os.setsid()
    os.chdir(copy)
    output = os.open("output.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path.insert(0, str(copy))
    import pytest

    files = [f"tests/{name}" for name in tests.split()]
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", f"not ({SLOW})", *files]))


def tests_fail(copy: Path, tests: str, timeout_s: float) -> bool:
    """Returns whether the tests fail, or take longer than `timeout_s`.

    They run in a fork of this process, which has already imported the slow libraries.
    """
    if (child := os.fork()) == 0:
        try:
            run_tests(copy, tests)
        finally:
            os._exit(1)  # whatever happens in the child, it must not continue with the parent's work
    deadline = time.monotonic() + timeout_s
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):  # the processes that the tests started end as well
        os.killpg(child, signal.SIGKILL)
    if ended == (0, 0):
        os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended[1]) != 0 if ended[0] else True


def try_module(module: str, num: int, seed: int, copy: Path) -> tuple[int, int]:
    """Tests a sample of a module's mutants and prints the survivors. Returns (killed, tried), two counts."""
    original, mutants = mutants_of(module)
    path = copy / "gymexp" / f"{module}.py"
    path.write_text(original)
    began = time.monotonic()
    if tests_fail(copy, MODULES[module], 600):
        sys.exit(f"{module}: its tests fail without a change:\n{(copy / 'output.txt').read_text()[-3000:]}")
    timeout_s = 3 * (time.monotonic() - began) + 10
    sample = random.Random(f"{seed}/{module}").sample(mutants, min(num, len(mutants)))
    killed = 0
    for source, diff in sample:
        path.write_text(source)
        if tests_fail(copy, MODULES[module], timeout_s):
            killed += 1
        else:
            print(f"\n{module} survived:", *diff[2:], sep="\n", flush=True)
    shutil.copy(ROOT / "gymexp" / f"{module}.py", path)
    print(f"{module}: {killed} of {len(sample)} killed ({len(mutants)} possible)", flush=True)
    return killed, len(sample)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("modules", nargs="*", default=[], help=f"of {' '.join(MODULES)}")
    parser.add_argument("--num", type=int, default=17, help="mutants a module")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.modules) - set(MODULES):
        parser.error(f"no such modules: {' '.join(sorted(unknown))}")
    for name in PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "gymexp"
        ignored = shutil.ignore_patterns(".venv", ".git", "outputs", ".*_cache", "__pycache__", ".hypothesis")
        shutil.copytree(ROOT, copy, ignore=ignored)
        results = [try_module(module, args.num, args.seed, copy) for module in args.modules or MODULES]
    killed, tried = (sum(column) for column in zip(*results, strict=True))
    print(f"all: {killed} of {tried} killed ({killed / tried:.0%})")


if __name__ == "__main__":
    main()
