"""From the configuration to the tasks of a run: fetched, checked, mixed, and written to the run's `data/`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from gymexp.config import EnvConfig, RunConfig
from gymexp.data.cache import Say
from gymexp.data.mix import describe, keys_sha256, mix
from gymexp.data.rows import load_rows, server_of
from gymexp.data.sources import fetch
from gymexp.errors import DataError
from gymexp.rollout.outcome import Task
from gymexp.run.directory import replace_file


@dataclass(frozen=True)
class Prepared:
    """The tasks of a run. `train` is in training order; `summary` is what `mix.json` holds."""

    train: list[Task]
    validation: dict[str, list[Task]]
    summary: dict[str, Any]


def prepare(config: RunConfig, gym_python: Path | None, cache: Path, say: Say) -> Prepared:
    """Fetch, check and mix the selected environments' tasks.

    gym_python: NeMo Gym's interpreter; may be None if `needs_gym_python` says no.
    """
    weights = {name: env.weight for name, env in config.env.items()}
    available: dict[str, list[Task]] = {}
    validation: dict[str, list[Task]] = {}
    sources: dict[str, dict[str, Any]] = {}
    known_agents = {env.agent for env in config.env.values()}
    for name, env in config.env.items():
        files = fetch(name, env, gym_python, cache, say)
        available[name] = _tasks(name, "train", env, files.train, env.data.train_size, known_agents)
        limit = min(
            (s for s in (env.data.validation_size, config.dataset.validation_size) if s), default=None
        )
        validation[name] = _tasks(name, "validation", env, files.validation, limit, known_agents)
        sources[name] = {"source": env.data.source} | {
            "train_file": str(files.train),
            "train_sha256": files.train_sha256,
            "validation_file": str(files.validation),
            "validation_sha256": files.validation_sha256,
        }
    dataset = config.dataset
    train = mix(available, weights, dataset.train_size, dataset.order, dataset.seed)
    summary = describe(train, available, weights, dataset.order, dataset.seed)
    for name, stated in summary["envs"].items():
        stated |= {"validation_tasks": len(validation[name])} | sources[name]
        if stated["repeats"]:
            count, there = stated["in_epoch"], stated["available"]
            say(f"{name}: {count} training tasks out of {there}: each {count / there:.1f} times an epoch")
    return Prepared(train, validation, summary)


def needs_gym_python(envs: Mapping[str, EnvConfig]) -> bool:
    return any(env.data.source == "generate" for env in envs.values())


def load_prepared(run_data_dir: Path) -> Prepared:
    """What `write_prepared` wrote to a run's `data/`: the same tasks in the same order."""
    try:
        summary = json.loads((run_data_dir / "mix.json").read_text())
        train = _read(run_data_dir / "train.jsonl")
        validation: dict[str, list[Task]] = {name: [] for name in summary["envs"]}
        for task in _read(run_data_dir / "validation.jsonl"):
            validation[task.env].append(task)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{run_data_dir} must hold mix.json, train.jsonl and validation.jsonl as written: {error}"
        ) from None
    if keys_sha256(train) != summary["sha256"]:
        raise DataError(
            f"{run_data_dir / 'train.jsonl'} does not hold the tasks that mix.json beside it describes"
        )
    return Prepared(train, validation, summary)


def _tasks(
    name: str, split: str, env: EnvConfig, path: Path, limit: int | None, known_agents: set[str]
) -> list[Task]:
    rows = load_rows(path, name, env.agent, known_agents, server=server_of(env.config_path), limit=limit)
    return [
        Task(f"{name}/{split}/{index:06d}", name, row["agent_ref"]["name"], row)
        for index, row in enumerate(rows)
    ]


def write_prepared(prepared: Prepared, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _write_tasks(directory / "train.jsonl", prepared.train)
    _write_tasks(directory / "validation.jsonl", (t for tasks in prepared.validation.values() for t in tasks))
    replace_file(directory / "mix.json", json.dumps(prepared.summary, indent=1) + "\n")


def _write_tasks(path: Path, tasks: Iterable[Task]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        for task in tasks:
            file.write(orjson.dumps(task) + b"\n")
    part.replace(path)


def _read(path: Path) -> list[Task]:
    """Tasks of a file; lines of the same key become one object, as in a mix that repeats tasks."""
    tasks: dict[str, Task] = {}
    ordered: list[Task] = []
    with path.open("rb") as file:
        for line in file:
            task = Task(**orjson.loads(line))
            ordered.append(tasks.setdefault(task.key, task))
    return ordered
