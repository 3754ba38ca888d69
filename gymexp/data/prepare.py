"""The tasks of a run: fetched, checked, mixed, and written to the run's `data/`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from gymexp.config.schema import EnvConfig, RunConfig
from gymexp.data.cache import Say
from gymexp.data.curriculum import draws_tasks
from gymexp.data.held_out import split
from gymexp.data.mix import describe, keys_sha256, mix, pool
from gymexp.data.request_check import Split, first_requests
from gymexp.data.rows import read_rows, server_of, with_system
from gymexp.data.sources import Files, fetch
from gymexp.data.weights import Weights
from gymexp.errors import DataError
from gymexp.files import replace_file, replacing
from gymexp.gym.definitions import fills_input
from gymexp.gym.install import site_packages
from gymexp.rollout.outcome import Task

_Reader = Callable[..., list[tuple[int, dict[str, Any]]]]


@dataclass(frozen=True)
class Prepared:
    """The tasks of a run. `train` is in training order, or has each task once if a curriculum draws them;
    `summary` is the content of `mix.json`. `requests` is the file of `first_requests`; None if the tasks come
    from a run directory, as they were checked when the run began."""

    train: list[Task]
    validation: dict[str, list[Task]]
    summary: dict[str, Any]
    requests: Path | None = field(default=None, compare=False)


def prepare(config: RunConfig, gym_python: Path, cache: Path, say: Say) -> Prepared:
    """Fetches, checks and mixes the tasks of the selected environments. gym_python: NeMo Gym's interpreter.
    Raises DataError if tasks cannot be fetched, or if a row breaks a rule."""
    weights = {name: env.weight for name, env in config.env.items()}
    splits: dict[tuple[str, str], Split] = {}
    sources: dict[str, dict[str, Any]] = {}
    for name, env in config.env.items():
        files = fetch(name, env, gym_python, cache, say)
        limit = min(
            (s for s in (env.data.validation_size, config.dataset.validation_size) if s), default=None
        )
        read, size = _reader(name, env, gym_python), env.data.train_size
        if env.data.validation_share is None:
            rows, held_out = read(files.train, limit=size), read(files.validation, limit=limit)
            train = _made(name, "train", env, files.train, files.train_sha256, rows)
            validation = _made(name, "validation", env, files.validation, files.validation_sha256, held_out)
        else:
            train, validation = _parts(name, env, files, read, limit)
        splits |= {(name, "train"): train, (name, "validation"): validation}
        sources[name] = {"source": env.data.source} | {
            "train_file": str(files.train),
            "train_sha256": files.train_sha256,
            "validation_file": str(files.validation),
            "validation_sha256": files.validation_sha256,
        }
        if env.data.validation_share is not None:
            sources[name]["validation_share"] = env.data.validation_share
    requests = first_requests(config, list(splits.values()), gym_python, cache, say)
    available = {name: _tasks(splits[name, "train"]) for name in config.env}
    validation_tasks = {name: _tasks(splits[name, "validation"]) for name in config.env}
    dataset = config.dataset
    if draws_tasks(dataset):
        schedule = Weights.of(config)
        mixed = pool(available, schedule.ever())
        weights = {name: float(weight) for name, weight in schedule.at(0).items()}
    else:
        mixed = mix(available, weights, dataset.train_size, dataset.order, dataset.seed)
    summary = describe(mixed, available, weights, dataset.order, dataset.seed)
    if draws_tasks(dataset):
        summary |= {"schedule": dataset.schedule, "sampling": dataset.sampling}
    for name, env_summary in summary["envs"].items():
        env_summary |= {"validation_tasks": len(validation_tasks[name])} | sources[name]
        if env_summary["repeats"]:
            count, distinct = env_summary["in_epoch"], env_summary["available"]
            repeats = f"each {count / distinct:.1f} times an epoch"
            say(f"{name}: {count} training tasks out of {distinct}: {repeats}")
    return Prepared(mixed, validation_tasks, summary, requests)


def needs_gym_python(envs: Mapping[str, EnvConfig]) -> bool:
    """Returns whether `fetch` needs NeMo Gym's interpreter for one of the environments."""
    datas = [env.data for env in envs.values()]
    return any(data.source in ("generate", "nemo_gym") or data.prompt_config for data in datas)


def load_prepared(run_data_dir: Path) -> Prepared:
    """Returns the tasks that `write_prepared` wrote to a run's `data/`, in the same order. Raises DataError
    if a file is missing or damaged, or if train.jsonl and mix.json do not belong together."""
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


def _reader(name: str, env: EnvConfig, python: Path) -> _Reader:
    """Returns what reads the rows of one of the environment's files, up to a limit."""
    return partial(
        read_rows,
        env_name=name,
        agent=env.agent,
        server=server_of(env.config_path),
        of_nemo_gym=env.data.source == "nemo_gym",
        may_be_empty=once(lambda: fills_input(name, env, site_packages(python), python)),
    )


def _parts(name: str, env: EnvConfig, files: Files, read: _Reader, limit: int | None) -> tuple[Split, Split]:
    """Returns the two parts of the training file (`data.validation_share`), each up to its limit."""
    data = env.data
    assert data.validation_share is not None
    rows = read(files.train)
    train, held_out = split(name, rows, data.validation_share, data.validation_seed)
    sizes = {"train": (train, data.train_size), "validation": (held_out, limit)}
    made = (
        _made(name, part, env, files.train, files.train_sha256, some[:size])
        for part, (some, size) in sizes.items()
    )
    return next(made), next(made)


def _made(
    name: str, part: str, env: EnvConfig, path: Path, sha256: str, rows: list[tuple[int, dict[str, Any]]]
) -> Split:
    """Returns rows with the system message of the user's. sha256: of their file."""
    if env.system_prompt is not None:
        for _, row in rows:
            row["responses_create_params"] |= {"input": with_system(row, env.system_prompt)}
    changed_by = [env.system_prompt, env.data.validation_share, env.data.validation_seed]
    if changed_by[:2] != [None, None]:  # the file alone does not tell what the rows are
        sha256 = hashlib.sha256(orjson.dumps([sha256, *changed_by])).hexdigest()
    return Split(name, part, path, sha256, rows)


def _tasks(split: Split) -> list[Task]:
    return [
        Task(split.key(index), split.env, row["agent_ref"]["name"], row)
        for index, (_, row) in enumerate(split.rows)
    ]


def write_prepared(prepared: Prepared, directory: Path) -> None:
    """Writes train.jsonl and validation.jsonl, with the tasks in order, and mix.json, for `load_prepared`."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_tasks(directory / "train.jsonl", prepared.train)
    _write_tasks(directory / "validation.jsonl", (t for tasks in prepared.validation.values() for t in tasks))
    replace_file(directory / "mix.json", json.dumps(prepared.summary, indent=1) + "\n")


def _write_tasks(path: Path, tasks: Iterable[Task]) -> None:
    with replacing(path) as part, part.open("wb") as file:
        for task in tasks:
            file.write(orjson.dumps(task) + b"\n")


def _read(path: Path) -> list[Task]:
    """Returns the tasks of a file, in order. Lines with the same key share one object, as in a mix that
    repeats tasks."""
    tasks: dict[str, Task] = {}
    ordered: list[Task] = []
    with path.open("rb") as file:
        for line in file:
            task = Task(**orjson.loads(line))
            ordered.append(tasks.setdefault(task.key, task))
    return ordered
