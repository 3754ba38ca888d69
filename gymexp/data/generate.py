"""`source=generate`: a script that runs in NeMo Gym's Python makes the tasks on this machine."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from gymexp.config.schema import DataConfig
from gymexp.data.cache import Say, cached, sha256_of
from gymexp.errors import DataError
from gymexp.gym.install import environ_for, site_packages
from gymexp.gym.server_venvs import python_of
from gymexp.processes.child_process import child_process

_DEADLINE_S = 1800.0
_ROUNDS = 5  # batches of validation puzzles at most; puzzles that are also train tasks do not count
_REASONING_GYM = "resources_servers/reasoning_gym"
_REASONING_GYM_SCRIPT = f"{_REASONING_GYM}/scripts/create_dataset.py"
_REASONING_GYM_OPTIONS = {"task", "config"}


def generate(
    name: str, data: DataConfig, gym_python: Path, cache: Path, say: Say
) -> tuple[Path, dict[str, str]]:
    """Returns the cache entry with train.jsonl and validation.jsonl, and the SHA-256 of each of its files."""
    if data.generator == "workplace":
        return _workplace(name, data, gym_python, cache, say)
    assert data.generator == "reasoning_gym", data.generator
    return _reasoning_gym(name, data, gym_python, cache, say)


def _reasoning_gym(
    name: str, data: DataConfig, python: Path, cache: Path, say: Say
) -> tuple[Path, dict[str, str]]:
    unknown = sorted(set(data.options) - _REASONING_GYM_OPTIONS)
    if unknown or not data.options.get("task"):
        problem = f"got {unknown[0]!r}" if unknown else "task is missing"
        raise DataError(
            f"env.{name}.data.options must be {{task: …, config: {{…}}}} for reasoning_gym, {problem}"
        )
    site = site_packages(python)
    script, python = site / _REASONING_GYM_SCRIPT, python_of(_REASONING_GYM, python, site)
    task, config = data.options["task"], data.options.get("config") or {}
    sizes = {"train": data.train_size, "validation": data.validation_size}
    seeds = {"train": data.train_seed, "validation": data.validation_seed}
    determined_by = {
        "generator": "reasoning_gym",
        "script": sha256_of(script),
        "versions": versions(python, ("nemo-gym", "reasoning-gym")),
        "options": {"task": task, "config": config},
        "sizes": sizes,
        "seeds": seeds,
    }

    def command(size: int, seed: int, output: Path) -> list[str]:
        options = {
            "--task": task,
            "--size": size,
            "--seed": seed,
            "--config": json.dumps(config),
            "--output": output,
        }
        # Without `-W ignore`, some of reasoning_gym's dependencies print SyntaxWarnings at every start.
        return [
            str(python),
            "-W",
            "ignore",
            str(script),
            *(str(part) for pair in options.items() for part in pair),
        ]

    def make(directory: Path) -> None:
        train, validation = directory / "train.jsonl", directory / "validation.jsonl"
        size, wanted = sizes["train"], sizes["validation"]
        assert size is not None and wanted is not None
        say(f"{name}: making {size} train and {wanted} validation tasks with reasoning_gym's {task}")
        start = _disjoint_seed(seeds["train"], size, seeds["validation"], wanted)
        if start != seeds["validation"]:
            say(
                f"{name}: reasoning_gym makes puzzle i from seed + i, so "
                f"validation_seed={seeds['validation']} would repeat puzzles of train_seed={seeds['train']}; "
                f"validation starts at seed {start} instead"
            )
        more = directory / "more.jsonl"
        _run_all(name, [command(size, seeds["train"], train), command(wanted, start, more)], say)
        train_rows = _read(train)
        if len(train_rows) < size:
            raise DataError(f"env.{name}.data: reasoning_gym made {len(train_rows)} of {size} train tasks")
        _write(train, train_rows)
        seen, kept = {row["question"] for row in train_rows}, []
        for _ in range(_ROUNDS):
            start += wanted
            for row in _read(more):
                if row["question"] not in seen:
                    seen.add(row["question"])
                    kept.append(row)
            if len(kept) >= wanted:
                break
            _run_all(name, [command(wanted, start, more)], say)
        else:
            raise DataError(
                f"env.{name}.data.validation_size is {wanted}, but {_ROUNDS * wanted} more puzzles of {task} "
                f"contained only {len(kept)} that are not train tasks: lower it, or train_size, "
                "or make the puzzles more varied"
            )
        more.unlink()
        _write(validation, kept[:wanted])

    return cached(cache, f"{name}-{task}", determined_by, make, say)


def _disjoint_seed(train_seed: int, size: int, validation_seed: int, wanted: int) -> int:
    """Returns a seed whose `wanted` puzzles are not among the `size` train puzzles: `validation_seed`, or the
    first seed after the train puzzles' if the two ranges overlap."""
    overlaps = validation_seed < train_seed + size and train_seed < validation_seed + wanted
    return train_seed + size if overlaps else validation_seed


def _workplace(
    name: str, data: DataConfig, python: Path, cache: Path, say: Say
) -> tuple[Path, dict[str, str]]:
    if data.options:
        raise DataError(f"env.{name}.data.options must be empty for generator=workplace, got {data.options}")
    script = Path(__file__).parent / "workplace" / "make.py"
    sources = script.parent.rglob("*.py")  # each of them decides what tasks the script makes
    determined_by = {
        "generator": "workplace",
        "script": {str(path.relative_to(script.parent)): sha256_of(path) for path in sorted(sources)},
        "versions": versions(python, ("nemo-gym",)),
        "sizes": [data.train_size, data.validation_size],
        "seed": data.train_seed,
    }

    def make(directory: Path) -> None:
        options = {
            "--train": data.train_size,
            "--validation": data.validation_size,
            "--seed": data.train_seed,
            "--output": directory,
        }
        say(f"{name}: making {data.train_size} train and {data.validation_size} validation tasks")
        command = [str(python), str(script), *(str(part) for pair in options.items() for part in pair)]
        _run_all(name, [command], say, on_line=say)
        for file in ("train.jsonl", "validation.jsonl", "demonstrations.jsonl"):
            if not (directory / file).exists():
                raise DataError(f"env.{name}.data: the workplace generator ended without writing {file}")

    return cached(cache, name, determined_by, make, say)


def versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Returns the versions of packages in the environment of `python`. Raises DataError if one is missing."""
    code = (
        "import json, sys, importlib.metadata as m; print(json.dumps([m.version(p) for p in sys.argv[1:]]))"
    )
    result = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=False)
    if result.returncode:
        raise DataError(
            f"{python} must have {' and '.join(packages)} installed, but: "
            f"{(result.stderr.strip().splitlines() or ['it failed'])[-1]}"
        )
    return dict(zip(packages, json.loads(result.stdout), strict=True))


def _read(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines() if line]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    # env.<name>.agent decides which agent plays a row, so the script's own choice is left out.
    lines = (orjson.dumps({k: v for k, v in row.items() if k != "agent_ref"}) + b"\n" for row in rows)
    path.write_bytes(b"".join(lines))


def _run_all(
    name: str, commands: list[list[str]], say: Say, on_line: Callable[[str], None] | None = None
) -> None:
    """Runs the commands at the same time. Raises DataError with the last output of the first that fails, or
    if they take longer than `_DEADLINE_S`."""
    deadline = time.monotonic() + _DEADLINE_S
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(child_process(command, environ_for(Path(command[0])), on_line))
            for command in commands
        ]
        for child, last_lines in running:
            try:
                code = child.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise DataError(
                    f"env.{name}.data: the generator was not done after {_DEADLINE_S:.0f} s"
                ) from None
            if code:
                raise DataError(f"env.{name}.data: the generator ended with code {code}:\n{last_lines()}")
